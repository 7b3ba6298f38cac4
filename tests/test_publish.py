"""Publishing, by the real hub client against a hub on this machine (tests/local_hub.py), over git-LFS.

Xet, by which the client uploads to huggingface.co, is switched off by the client's own setting: the local hub does
not speak it. What lmdqn calls is the same.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmdqn
from lmdqn.model.loading import load_model, load_trained
from lmdqn.recipe import Recipe, load_recipe
from lmdqn.results.model_card import Published, _method, _opening, model_card, public_recipe, snippet
from tests.local_hub import TOKEN, Hub, running
from tests.runs import write_splits

CommandLine = Callable[..., Any]
WORDS = ("one", "two", "three", "four", "five", "six")
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LOADING = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
for name, load in {loads}.items():
    with torch.no_grad():
        torch.save(eval(load)(torch.arange(3, 20)[None]).logits, name)
"""


def write_recipe(folder: Path, **changes: dict[str, Any]) -> Path:
    """A recipe of seconds, on six examples."""
    rows = [{"source": f"say {word}", "references": [word]} for word in WORDS]
    data = write_splits(folder / "my secret folder", rows)
    tree: dict[str, Any] = {
        "model": {"from_scratch": {"family": "llama", "vocabulary_size": 300, "config": LLAMA}},
        "data": {"path": str(data), "max_response_tokens": 8},
        "warm_start": {"epochs": 2},
        "rollout": {"prompts": 2, "samples": 2},
        "replay": {"batch_groups": 2},
        "qlearning": {"max_steps": 2},
        "evaluation": {"bootstrap_samples": 100},
        "output": {"dir": str(folder / "run")},
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**tree, **changes}), encoding="utf-8")
    return recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all weights, its head tied to its embeddings."""
    folder = tmp_path_factory.mktemp("full")
    lmdqn.train(load_recipe(write_recipe(folder)))
    return folder / "run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that this process and its children talk to, signed in."""
    with running() as hub:
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
        yield hub


@pytest.fixture
def push(command_line: CommandLine) -> Callable[..., Any]:
    return lambda *arguments: command_line("push", *arguments)


def in_a_fresh_process(code: str, folder: Path) -> str:
    """What the code prints, run in a folder by a Python that was never here."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


def card_of(hub: Hub, repository: str) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard(hub.repositories[repository].files()["README.md"].decode())


def snippet_of(card: huggingface_hub.ModelCard) -> str:
    found = re.search(r"```python\n(.+?)```", card.text, re.S)
    assert found
    return found[1]


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_model_comes_back_from_the_hub_as_it_went(hub: Hub, run: Path, push: CommandLine, tmp_path: Path) -> None:
    ran = push(run, "jane/tied")
    assert ran.code == 0, ran.err
    repository = hub.repositories["jane/tied"]
    assert ran.out.strip() == f"{hub.url}/jane/tied/commit/{repository.branches['main'][-1]}"
    assert len(repository.branches["main"]) == 2  # the hub's own first commit, and ours
    assert hub.large_files  # the weights went by LFS
    assert set(repository.files()) == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    loading = LOADING.format(loads={"tied": 'AutoModelForCausalLM.from_pretrained("jane/tied")'})
    printed = in_a_fresh_process(loading + snippet_of(card_of(hub, "jane/tied")), tmp_path)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(run / "model"))
    torch.testing.assert_close(torch.load(tmp_path / "tied"), expected, rtol=0, atol=0)
    assert printed.strip() == lmdqn.generate(run, ["..."])[0]


def test_an_adapter_and_its_merge_come_back(hub: Hub, run: Path, push: CommandLine, tmp_path: Path) -> None:
    """The base lies on the hub too; a run elsewhere adapts it; both ways to publish that run give its logits."""
    assert push(run, "jane/base").code == 0
    model = {"name": "jane/base", "lora": {"rank": 4, "alpha": 16}}
    recipe = write_recipe(tmp_path, model=model)
    done = subprocess.run(
        [sys.executable, "-m", "lmdqn", "train", str(recipe)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    adapted = tmp_path / "run"
    weights = adapted / "model" / "adapter_model.safetensors"
    learnt = {name: torch.randn_like(tensor) / 4 for name, tensor in load_file(weights).items()}  # not two steps' worth
    save_file(learnt, weights, metadata={"format": "pt"})
    assert push(adapted, "jane/adapter").code == 0
    # The base was loaded from the hub in another process; this one reads its cache.
    cached = next((tmp_path / "hf" / "hub").rglob("model.safetensors")).parent
    base = AutoModelForCausalLM.from_pretrained(cached)
    expected = logits_of(PeftModel.from_pretrained(base, adapted / "model"))
    assert not torch.equal(expected, logits_of(AutoModelForCausalLM.from_pretrained(cached)))
    assert card_of(hub, "jane/adapter").data.to_dict()["base_model"] == "jane/base"
    assert set(hub.repositories["jane/adapter"].files()) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    # Merged here by the folder of the base, as this process is not on the hub's cache.
    adapter_config = adapted / "model" / "adapter_config.json"
    adapter_config.write_text(adapter_config.read_text().replace("jane/base", str(cached)))
    refused = push(adapted, "jane/merged")
    assert refused.code == 2
    assert f"local folder {cached}, which nobody else has: add --merge" in refused.err
    assert push(adapted, "jane/merged", "--merge").code == 0
    generate = [sys.executable, "-m", "lmdqn", "generate", "jane/adapter", "--recipe", str(recipe), "--source", "..."]
    ran = subprocess.run(generate, capture_output=True, text=True, timeout=300)
    assert ran.stdout.strip() == lmdqn.generate(adapted, ["..."])[0], ran.stderr
    loads = {
        "adapter": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("jane/base"), "jane/adapter")',
        "merged": 'AutoModelForCausalLM.from_pretrained("jane/merged")',
    }
    in_a_fresh_process(LOADING.format(loads=loads) + snippet_of(card_of(hub, "jane/adapter")), tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "adapter"), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.load(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)
    assert_nothing_leaks(hub, tmp_path)


def assert_nothing_leaks(hub: Hub, *folders: Path) -> None:
    """No token and no path of this machine in anything that was published."""
    for name, repository in hub.repositories.items():
        for file, content in repository.files().items():
            assert TOKEN.encode() not in content, (name, file)
            for folder in (*folders, Path.home() / ".cache"):
                assert str(folder).encode() not in content, (name, file)


def test_the_card_says_what_the_run_knows(hub: Hub, run: Path, push: CommandLine) -> None:
    push(run, "jane/tied")
    assert_nothing_leaks(hub, run.parent)
    card = card_of(hub, "jane/tied")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))["test"]["dqn"]
    metadata = card.data.to_dict()
    assert (metadata["library_name"], metadata["model-index"][0]["name"]) == ("transformers", "tied")
    (measured,) = metadata["model-index"][0]["results"]
    assert measured["dataset"] == {"name": "my secret folder", "type": "my secret folder", "split": "test"}
    values = {(metric["type"], metric["name"]): metric["value"] for metric in measured["metrics"]}
    assert set(values) == {
        ("rouge", "ROUGE-1"),
        ("rouge", "ROUGE-2"),
        ("rouge", "ROUGE-L"),
        ("rouge", "ROUGE-Lsum"),
        ("bleu", "BLEU"),
        ("chrf", "chrF"),
    }
    assert values["rouge", "ROUGE-L"] == pytest.approx(results["rougeL"], abs=0.005)
    for heading in ("How to load", "Results", "Data", "Method", "Intended use", "Limits", "Recipe"):
        assert f"\n## {heading}\n" in card.text
    assert "Q(s, a) = V(s) + beta log(pi(a|s) / pi_0(a|s))" in card.text
    assert "6 test examples" in card.text
    low, high = json.loads((run / "results.json").read_text(encoding="utf-8"))["interval"]["dqn"]["bleu"]
    assert f"| DQN | {results['bleu']:.1f} [{low:.1f}, {high:.1f}] |" in card.text


def test_branches_and_privacy(hub: Hub, run: Path, push: CommandLine) -> None:
    assert push(run, "jane/closed", "--private", "--revision", "short").code == 0
    repository = hub.repositories["jane/closed"]
    assert repository.private
    assert set(repository.files("main")) == {".gitattributes"}
    assert "config.json" in repository.files("short")
    assert 'from_pretrained(repository, revision="short")' in repository.files("short")["README.md"].decode()


# --- refused, and cut -------------------------------------------------------------------------------------------------


def test_no_token_and_a_wrong_one(hub: Hub, run: Path, push: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub refuses the token: run `hf auth login`" in push(run, "jane/x").err
    monkeypatch.delenv("HF_TOKEN")
    ran = push(run, "jane/x")
    assert (ran.code, ran.err) == (2, "lmdqn: no hub token: run `hf auth login`, or set HF_TOKEN\n")
    assert not hub.repositories


def test_what_cannot_be_published(hub: Hub, run: Path, push: CommandLine, tmp_path: Path) -> None:
    assert "must read USER/NAME" in push(run, "just-a-name").err
    assert "You don't have the rights to create a model under the namespace 'john'" in push(run, "john/x").err
    assert "is no run of lmdqn" in push(tmp_path, "jane/x").err
    assert "there is no adapter to merge" in push(run, "jane/x", "--merge").err
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    assert "it has not ended" in push(tmp_path, "jane/x").err
    assert not hub.repositories


def test_an_existing_repository_is_kept_unless_told(hub: Hub, run: Path, push: CommandLine) -> None:
    push(run, "jane/x")
    repository = hub.repositories["jane/x"]
    repository.commit("main", {**repository.files(), "adapter_config.json": b"{}", "README.md": b"mine"})
    ran = push(run, "jane/x")
    assert ran.code == 2
    assert "jane/x already holds files on main: --replace commits this run in their place" in ran.err
    assert "--private hides no existing repository" in push(run, "jane/x", "--private", "--replace").err
    assert repository.files()["README.md"] == b"mine"
    assert push(run, "jane/x", "--replace").code == 0
    assert "adapter_config.json" not in repository.files()  # it would make the repository an adapter
    assert repository.files()["README.md"] != b"mine"


def test_a_cut_upload_leaves_no_commit_and_can_be_repeated(hub: Hub, run: Path, push: CommandLine) -> None:
    hub.cut_uploads = 10**6
    ran = push(run, "jane/x")
    assert ran.code == 2
    assert re.search(r"the upload to jane/x was cut \(.+\): nothing was committed, run the same command", ran.err)
    assert ran.err.count("\n") == 1
    assert len(hub.repositories["jane/x"].branches["main"]) == 1
    assert not hub.large_files
    hub.cut_uploads = 1  # the client itself tries again
    assert push(run, "jane/x").code == 0
    assert len(hub.repositories["jane/x"].branches["main"]) == 2


def test_a_commit_cut_off_is_told_apart(hub: Hub, run: Path, push: CommandLine) -> None:
    hub.cut_commits = 1
    ran = push(run, "jane/x")
    assert ran.code == 2
    assert "jane/x did not confirm the commit" in ran.err
    assert f"look at {hub.url}/jane/x" in ran.err
    assert push(run, "jane/x").code == 0


def test_the_token_is_written_nowhere(hub: Hub, run: Path, push: CommandLine, tmp_path: Path) -> None:
    hub.cut_uploads = 10**6
    outputs = [push(run, "jane/x")]
    hub.cut_uploads = 0
    outputs.append(push(run, "jane/x"))
    assert all(TOKEN not in ran.out + ran.err for ran in outputs)
    for file in [*run.rglob("*"), *tmp_path.rglob("*")]:
        assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file


# --- the card by itself -----------------------------------------------------------------------------------------------


def recipe_of(**changes: dict[str, Any] | None) -> Recipe:
    tree = {"model": {"name": "google/flan-t5-small"}, "data": {"hub": "knkarthick/samsum"}}
    return Recipe.model_validate({**tree, **changes})


def test_the_public_recipe_names_no_folder_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(
        model={"name": "models/base"},
        data={"path": "clients/acme", "prompt": "/no_think Summarise: {source} yes/no"},
        reward={"mix": {"clients/taste.py:short": 1.0}},
        offline={"path": "clients/acme/log.jsonl"},
    )
    monkeypatch.chdir("/")
    shown = yaml.safe_load(public_recipe(recipe))
    places = (shown["model"]["name"], shown["data"]["path"], shown["offline"]["path"], *shown["reward"]["mix"])
    assert places == ("base", "acme", "log.jsonl", "taste.py:short")
    assert shown["data"]["prompt"] == "/no_think Summarise: {source} yes/no"


def test_the_card_says_what_the_reference_is() -> None:
    assert "pi_0 is the frozen start of the DQN phase." in _method(recipe_of())
    reset = _method(recipe_of(qlearning={"reference_reset_every": 9}))
    assert "up to 9 updates before, the frozen start of the DQN phase at first" in reset
    learnt_on = recipe_of(continued={"run": "runs/first"}, warm_start=None, replay={"fresh_share": 0.5})
    assert "pi_0 is the reference of the run that this one learnt on from." in _method(learnt_on)
    assert "on from an earlier run" in _opening(learnt_on, Published("jane/x", "main", False, True))


def test_the_snippet_runs_a_models_own_code_where_the_run_did() -> None:
    for is_adapter in (False, True):
        published = Published("jane/x", "main", is_adapter, False)
        model = {"name": "jane/own", "trust_remote_code": True}
        assert snippet(recipe_of(model=model), published).count("trust_remote_code=True") == 2
        assert "trust_remote_code" not in snippet(recipe_of(), published)


def test_the_public_recipe_names_no_folder(tmp_path: Path) -> None:
    taste = tmp_path / "taste.py"
    recipe = recipe_of(
        model={"name": str(tmp_path / "models" / "base")},
        data={"path": str(tmp_path / "secret" / "pairs"), "prompt": "and/or: {source}"},
        reward={"mix": {f"{taste}:short": 0.5, "package.module:score": 0.25, "bleu": 0.25}},
        output={"dir": "runs/of me/mine"},
    )
    shown = yaml.safe_load(public_recipe(recipe))
    assert (shown["model"]["name"], shown["data"]["path"], shown["output"]["dir"]) == ("base", "pairs", "mine")
    assert shown["reward"]["mix"] == {"taste.py:short": 0.5, "package.module:score": 0.25, "bleu": 0.25}
    assert shown["data"]["prompt"] == "and/or: {source}"
    assert yaml.safe_load(public_recipe(recipe_of()))["model"]["name"] == "google/flan-t5-small"


EQUATIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "default": (
        {},
        ["beta log(pi(a|s)", "lambda [ y_{t+1} - beta log", "log sum_a pi_0", "- y_t) / beta)^2", "lambda = 1, by its"],
    ),
    "quantiles": ({"value_quantiles": 4, "value_trace": 0.9}, ["lambda = 0.9, by quantile regression"]),
    "textbook": (
        {"form": "classic"},
        ["logit of a in s", "y_t = r_t + gamma B(s_{t+1})", "max_a Qbar", "- y_t))^2 / 2"],
    ),
    "path": ({"loss": "path"}, ["V(s_1) = the mean over the prompt's responses", "- R) / beta)^2"]),
    "demonstrations": ({"supervised": 2.0}, ["on tokens of demonstrations instead 2 times -log pi(a_t|s_t)"]),
    "n-step": ({"n_step": 3}, ["y_t = the 3-step return"]),
}


@pytest.mark.parametrize("kind", EQUATIONS)
def test_the_card_shows_the_equations_that_were_learnt_by(kind: str) -> None:
    qlearning, expected = EQUATIONS[kind]
    phase = {"bleu": 1.0, "distinct2": 5.0}
    results = {
        "test": {"start": {**phase, "distinct2": 9.0}, "dqn": phase},
        "interval": {"start": {}, "dqn": {}},
        "p_value": {"bleu": 0.5},
        "seconds": {"dqn": 59.6, "total": 80.0},
        "environment": {"lmdqn": "0.1", "torch": "2.13", "transformers": "5.1", "device": "an abacus"},
    }
    replay = {"demonstrations": 1} if "supervised" in qlearning else {}
    card = model_card(
        recipe_of(qlearning=qlearning, replay=replay), results, 7, Published("jane/x", "main", False, True)
    ).text
    how = "DQN 60 s on an abacus; lmdqn 0.1, torch 2.13, transformers 5.1."
    for part in [*expected, "7 test examples", "distinct-2 from 9.0 to 5.0", "google/flan-t5-small", how]:
        assert part in card, part


SNIPPETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "seq2seq": (
        {"family": "t5", "config": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}},
        {"prompt": "summarise: {source}"},
    ),
    "chat": ({"family": "llama", "config": LLAMA}, {"chat": True, "system": 'Say "it"'}),
    "causal": ({"family": "llama", "config": LLAMA}, {"prompt": "{source}\n=>"}),
}


@pytest.mark.parametrize("kind", SNIPPETS)
def test_the_snippet_answers_as_lmdqn_does(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scratch, data = SNIPPETS[kind]
    data = {**data, "path": ".", "max_response_tokens": 16}
    recipe = recipe_of(model={"from_scratch": {**scratch, "vocabulary_size": 300}}, data=data)
    loaded = load_model(recipe.model, ["some words"], seed=3, max_response_tokens=16)
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    published = Published(str(tmp_path), "main", is_adapter=False, is_seq2seq=kind == "seq2seq")
    exec(snippet(recipe, published), {})
    again = load_trained(tmp_path, recipe.model, 16)
    assert again.layout.is_seq2seq == (kind == "seq2seq")
    expected = lmdqn.generate(tmp_path, ["..."], recipe)[0]
    assert capsys.readouterr().out.strip() == expected.strip()
    assert expected
