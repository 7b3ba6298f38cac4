"""What the user can mend ends in one sentence on standard error and exit code 2, before anything is written."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmdqn

WriteData = Callable[..., Path]
WriteRecipe = Callable[[Any], Path]

GPT2 = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}


class Refusals:
    """Runs of the command line that must be refused, in a folder of their own."""

    def __init__(
        self, folder: Path, command_line: Callable[..., Any], write_recipe: WriteRecipe, write_data: WriteData
    ):
        self.folder = folder
        self.output = folder / "run"
        self.write_data = write_data
        self.tree: dict[str, Any] = {
            "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": dict(GPT2)}},
            "data": {"path": str(folder / "data"), "max_response_tokens": 8},
            "rollout": {"prompts": 2, "samples": 2},
            "replay": {"batch_groups": 2},
            "qlearning": {"max_steps": 1},
            "evaluation": {"bootstrap_samples": 100},
            "output": {"dir": str(self.output)},
        }
        self._command_line = command_line
        self._write_recipe = write_recipe

    def of(self, *arguments: object) -> str:
        """The sentence after `lmdqn: ` with which `lmdqn ARGUMENTS` is refused."""
        before = self._files()
        ran = self._command_line(*arguments)
        assert ran.code == 2
        assert ran.err.startswith("lmdqn: ")
        assert ran.err.endswith("\n")
        assert ran.err.count("\n") == 1, ran.err
        assert "Traceback" not in ran.err + ran.out
        assert self._files() == before
        return ran.err.removeprefix("lmdqn: ").rstrip("\n")

    def of_training(self, *overrides: str, **sections: dict[str, Any] | None) -> str:
        """The same for `lmdqn train` with a sound recipe in which some sections are replaced, and overrides."""
        tree = {name: part for name, part in {**copy.deepcopy(self.tree), **sections}.items() if part is not None}
        if not (self.folder / "data").exists():
            self.write_data()
        return self.of("train", self._write_recipe(tree), *overrides)

    def of_model(self, folder: Path, *overrides: str) -> str:
        """The same where the recipe names a pretrained model."""
        return self.of_training(*overrides, model={"name": str(folder)})

    def _files(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.folder.rglob("*")}


@pytest.fixture
def refusal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command_line: Callable[..., Any],
    write_recipe: WriteRecipe,
    write_data: WriteData,
) -> Refusals:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_recipe({})  # so that the folder looks the same before and after
    return Refusals(tmp_path, command_line, write_recipe, write_data)


# --- recipes ------------------------------------------------------------------------------------------------------


def test_unknown_key(refusal: Refusals) -> None:
    sentence = refusal.of_training(qlearning={"max_step": 1})
    assert sentence.endswith("unknown key 'qlearning.max_step'; did you mean 'max_steps'?")


def test_unknown_key_of_an_override(refusal: Refusals) -> None:
    assert "did you mean 'beta'?" in refusal.of_training("qlearning.bta=1")


def test_wrong_type(refusal: Refusals) -> None:
    sentence = refusal.of_training("qlearning.max_steps=some")
    assert "qlearning.max_steps" in sentence
    assert "'some'" in sentence


def test_impossible_pair(refusal: Refusals) -> None:
    sentence = refusal.of_training("qlearning.loss=path", "qlearning.form=classic")
    assert "qlearning.loss=path" in sentence
    assert "qlearning.form=dueling" in sentence


def test_unknown_recipe(refusal: Refusals) -> None:
    assert "shipped recipe 'quickstart_sumarisation'" in refusal.of("train", "quickstart_sumarisation")


def test_missing_recipe_file(refusal: Refusals) -> None:
    assert "'none.yaml'" in refusal.of("train", "none.yaml")


@pytest.mark.parametrize(
    "overrides",
    [
        ["evaluation.metric=bloo"],
        ["evaluation.metric=bleu", "data.references=null", "reward.mix={repetition: -1}"],
    ],
    ids=["unknown", "of references that are not there"],
)
def test_metric_that_is_not_measured(refusal: Refusals, overrides: list[str]) -> None:
    assert "evaluation.metric" in refusal.of_training(*overrides)


def test_missing_reward_function(refusal: Refusals) -> None:
    assert "'no_such_module:f'" in refusal.of_training("reward.mix={'no_such_module:f': 1}")


@pytest.mark.parametrize(
    "line", ["X = undefined_name", "import sys; sys.exit()", "{}['key']", "raise RuntimeError", "import no_such"]
)
def test_reward_file_that_fails(refusal: Refusals, line: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(f"import math\n{line}\n", encoding="utf-8")
    sentence = refusal.of_training(f"reward.mix={{'{tmp_path}/mine.py:f': 1}}")
    assert f"cannot load {tmp_path}/mine.py" in sentence
    assert "importlib" not in sentence
    assert f"(line 2 of {tmp_path}/mine.py)" in sentence


@pytest.mark.parametrize(
    ("scratch", "named"),
    [
        ({"family": "gpt22"}, ["model.from_scratch.family", "'gpt22'"]),
        ({"family": "vit"}, ["model.from_scratch.family", "'vit'", "LM head"]),
        ({"config": {**GPT2, "n_layers": 1}}, ["model.from_scratch.config", "'n_layers'", "'n_layer'"]),
        ({"config": {**GPT2, "n_layer": "two"}}, ["model.from_scratch.config", "n_layer", "expected int"]),
        ({"config": {**GPT2, "n_embd": 15}}, ["model.from_scratch.config", "15"]),
    ],
    ids=["family", "no LM", "field", "type", "impossible size"],
)
def test_model_that_cannot_be_built(refusal: Refusals, scratch: dict[str, Any], named: list[str]) -> None:
    sound = refusal.tree["model"]["from_scratch"]
    sentence = refusal.of_training(model={"from_scratch": {**sound, **scratch}})
    for words in named:
        assert words in sentence


# --- data ---------------------------------------------------------------------------------------------------------


def test_missing_folder(refusal: Refusals) -> None:
    assert refusal.of_training("data.path=nowhere").startswith("data.path nowhere is not a folder")


def test_missing_file(refusal: Refusals) -> None:
    (refusal.write_data() / "validation.jsonl").unlink()
    assert "has no validation.jsonl" in refusal.of_training()


def test_missing_column(refusal: Refusals) -> None:
    sentence = refusal.of_training("data.source=sources")
    assert sentence.endswith("train.jsonl, line 1: no column 'sources'; did you mean 'source'?")


def test_empty_split(refusal: Refusals) -> None:
    refusal.write_data(validation=[])
    assert refusal.of_training().endswith("validation.jsonl: the validation split is empty")


def test_malformed_line(refusal: Refusals) -> None:
    with (refusal.write_data() / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"source": \n')
    assert "test.jsonl, line 4: not valid JSON" in refusal.of_training()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (r'{"source": "\ud83d x", "references": "y"}', r"half of a surrogate pair, '\ud83d'"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["half an emoji", "deep"],
)
def test_line_that_is_no_text(refusal: Refusals, line: str, problem: str) -> None:
    with (refusal.write_data() / "test.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    assert f"test.jsonl, line 4: not valid JSON ({problem})" in refusal.of_training()


def test_prompt_longer_than_the_context(refusal: Refusals) -> None:
    refusal.write_data(test=[{"source": "0123456789" * 7, "references": "x"}])
    assert "set data.max_prompt_tokens=56" in refusal.of_training()


def test_unknown_column_of_the_template(refusal: Refusals) -> None:
    assert "did you mean 'source'?" in refusal.of_training("data.prompt='say {sourc}'")


def test_chat_with_a_model_that_knows_none(refusal: Refusals) -> None:
    assert "data.chat" in refusal.of_training("data.chat=true")


def test_hub_data_without_network(refusal: Refusals) -> None:
    sentence = refusal.of_training("data.path=null", "data.hub=nobody-at-all/no-such-data")
    assert sentence.startswith("cannot load nobody-at-all/no-such-data [train]")


# --- models -------------------------------------------------------------------------------------------------------


def save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def tiny_gpt2(tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **GPT2))


def test_tokenizer_without_pad(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    byte_tokenizer.pad_token = None
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    sentence = refusal.of_model(folder)
    assert f"the tokenizer of {folder} has no pad_token: set model.pad_token" in sentence
    assert "'</s>' will do" in sentence


def test_tokenizer_without_eos(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    byte_tokenizer.eos_token = None
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    assert f"the tokenizer of {folder} has no eos_token: set model.eos_token" in refusal.of_model(folder)


def test_pad_token_that_is_not_in_the_vocabulary(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    assert "model.pad_token '[PAD]' is not in the vocabulary" in refusal.of_model(folder, "model.pad_token='[PAD]'")


def test_folder_without_a_tokenizer(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    """transformers makes one up for it, which knows no word of any text."""
    tiny_gpt2(byte_tokenizer).save_pretrained(tmp_path / "model")
    sentence = refusal.of_model(tmp_path / "model", "model.pad_token='<|endoftext|>'")
    assert f"tokenizer of {tmp_path / 'model'}" in sentence


def test_folder_without_weights(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    (folder / "model.safetensors").unlink()
    assert f"cannot load model {folder}" in refusal.of_model(folder)


def test_broken_weights(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    (folder / "model.safetensors").write_bytes(b"cut short")
    assert f"cannot load model {folder}" in refusal.of_model(folder)


class Harmful:
    """Unpickled, it runs code: it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_no_pickled_weights_are_read(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    import torch

    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Harmful(tmp_path / "was here")}, folder / "pytorch_model.bin")
    assert f"cannot load model {folder}" in refusal.of_model(folder)
    assert not (tmp_path / "was here").exists()


def test_no_pickled_adapter_is_read(byte_tokenizer: Any, tmp_path: Path) -> None:
    import torch

    from lmdqn.model.loading import load_trained
    from lmdqn.recipe import ModelSection

    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    torch.save({"weight": Harmful(tmp_path / "was here")}, folder / "adapter_model.bin")
    with pytest.raises(lmdqn.UserError, match=r"has no adapter_model\.safetensors"):
        load_trained(folder, ModelSection(name=str(folder)), 8)
    assert not (tmp_path / "was here").exists()


def test_adapter_in_the_place_of_a_model(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    (folder / "config.json").rename(folder / "adapter_config.json")
    sentence = refusal.of_model(folder)
    assert f"model {folder} is an adapter" in sentence
    assert "merge it into its base" in sentence


@pytest.mark.parametrize(
    ("dtype", "otherwise"), [("float16", "mixed_precision=fp16"), ("bfloat16", "mixed_precision=bf16")]
)
def test_weights_too_coarse_to_learn(
    refusal: Refusals, byte_tokenizer: Any, tmp_path: Path, dtype: str, otherwise: str
) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    sentence = refusal.of_model(folder, f"model.dtype={dtype}")
    assert "model.dtype=float32" in sentence
    assert otherwise in sentence


def test_image_model(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    folder = save(tmp_path, ViTForImageClassification(config), byte_tokenizer)
    assert refusal.of_model(folder) == f"model {folder} (vit) has no LM head to read as Q-values"


def test_trunk_without_its_untied_head(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    folder = save(tmp_path, LlamaModel(config), byte_tokenizer)
    assert refusal.of_model(folder).startswith(f"model {folder} has no LM head to read as Q-values")


def test_text_classifier(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=len(byte_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    folder = save(tmp_path, BertForSequenceClassification(config), byte_tokenizer)
    assert f"model {folder}" in (sentence := refusal.of_model(folder))
    assert "LM head" in sentence


def test_other_architecture_than_the_recipes(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    sentence = refusal.of_model(folder, "model.architecture=seq2seq")
    assert sentence == f"model {folder} is causal: set model.architecture=causal or auto"


def test_adapter_on_modules_that_are_not_there(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    sentence = refusal.of_model(folder, "model.lora.target_modules=[no_such_module]")
    assert sentence.startswith("model.lora: ")
    assert "no_such_module" in sentence


def test_hub_model_without_network(refusal: Refusals) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    sentence = refusal.of_training(model={"name": "nobody-at-all/no-such-model"})
    assert sentence.startswith("cannot load model nobody-at-all/no-such-model: ")


# --- outputs and other commands -----------------------------------------------------------------------------------


def test_folder_that_holds_a_run(refusal: Refusals) -> None:
    refusal.output.mkdir()
    (refusal.output / "recipe.yaml").write_text("seed: 1\n", encoding="utf-8")
    sentence = refusal.of_training()
    assert str(refusal.output) in sentence
    assert "output.overwrite=true" in sentence


def test_overwriting_a_folder_that_is_no_run(refusal: Refusals) -> None:
    refusal.output.mkdir()
    (refusal.output / "model").mkdir()
    assert f"{refusal.output} is not empty and no run" in refusal.of_training("output.overwrite=true")
    (refusal.output / "thesis.tex").write_text("years of work", encoding="utf-8")
    assert f"{refusal.output} holds thesis.tex, which no run wrote" in refusal.of_training("output.overwrite=true")


def test_output_that_is_a_file(refusal: Refusals) -> None:
    refusal.output.write_text("", encoding="utf-8")
    sentence = refusal.of_training()
    assert f"output.dir {refusal.output}" in sentence
    assert sentence.endswith("is a file")


def test_output_below_a_file(refusal: Refusals) -> None:
    refusal.output.write_text("", encoding="utf-8")
    assert "output.dir" in refusal.of_training(f"output.dir={refusal.output}/deeper")


def test_evaluating_a_bare_model_without_a_recipe(refusal: Refusals, byte_tokenizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, tiny_gpt2(byte_tokenizer), byte_tokenizer)
    sentence = refusal.of("evaluate", folder)
    assert sentence == f"{folder} is no run of lmdqn: give --recipe, one that names the data for it"


def test_evaluating_a_run_that_saved_no_model(refusal: Refusals) -> None:
    refusal.output.mkdir()
    smallest = "model: {from_scratch: {}}\ndata: {path: data}\n"
    (refusal.output / "recipe.yaml").write_text(smallest, encoding="utf-8")
    assert f"run {refusal.output} has no model/ folder" in refusal.of("evaluate", refusal.output)


def test_generating_from_nothing(refusal: Refusals, tmp_path: Path) -> None:
    assert "--source" in refusal.of("generate", "some/model")
    assert refusal.of("generate", "some/model", "--input", "none.txt") == (
        "cannot read none.txt: No such file or directory"
    )


def test_copying_a_recipe_over_a_file(refusal: Refusals, tmp_path: Path) -> None:
    from lmdqn.shipped import shipped_recipes

    mine = tmp_path / "mine.yaml"
    mine.write_text("seed: 1\n", encoding="utf-8")
    assert refusal.of("recipes", "copy", next(iter(shipped_recipes())), mine).startswith(f"{mine} is already there")
    assert mine.read_text(encoding="utf-8") == "seed: 1\n"


def said_by_a_process(arguments: list[object], **environment: str) -> str:
    """What a refused command writes to standard error in a process of its own, in which retries do not wait."""
    at_once = "import time; time.sleep = lambda seconds: None; from lmdqn.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", at_once, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(lmdqn.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 2
    return ended.stderr


def test_a_process_of_its_own_says_no_more(
    refusal: Refusals, write_recipe: WriteRecipe, byte_tokenizer: Any, tmp_path: Path
) -> None:
    """Libraries write to standard error, too: warnings, progress bars, reports of what was loaded."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    folder = save(tmp_path, LlamaModel(config), byte_tokenizer)
    refusal.write_data()
    said = said_by_a_process(["train", write_recipe({**refusal.tree, "model": {"name": str(folder)}})])
    assert said.startswith("lmdqn: ")
    assert said.count("\n") == 1, said
    assert not refusal.output.exists()


@pytest.mark.parametrize("wanted", ["model", "data"])
def test_a_hub_out_of_reach_says_no_more(
    wanted: str, refusal: Refusals, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Its client tries six times, and would tell of each."""
    refusal.write_data()
    gone = {"model": {"name": "nobody/no-model"}} if wanted == "model" else {"data": {"hub": "nobody/no-data"}}
    unreachable = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    said = said_by_a_process(["train", write_recipe({**refusal.tree, **gone})], **unreachable)
    assert said.startswith("lmdqn: cannot load ")
    assert said.count("\n") == 1, said
    assert not refusal.output.exists()
