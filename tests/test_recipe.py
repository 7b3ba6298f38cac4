"""Recipes: what is refused and in which words, overrides, defaults, and the shipped files."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from lmdqn.errors import UserError
from lmdqn.recipe import Recipe, Section, dump_recipe, load_recipe, nearest, validate
from lmdqn.shipped import describe, find_recipe, shipped_recipes

WriteRecipe = Callable[[Any], Path]
SMALLEST = {"model": {"from_scratch": {}}, "data": {"path": "folder"}}
PRETRAINED = ["model.from_scratch=null", "model.name=some/model"]
HALF_TARGET = ["qlearning.target_dtype=bfloat16", "qlearning.target_polyak=null", "qlearning.target_copy_every=5"]


def refusal(file: Path, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(UserError) as refused:
        load_recipe(file, overrides)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert "validation error" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("overrides", "unknown", "meant"),
    [
        (["qlerning.beta=1"], "qlerning", "qlearning"),
        (["sed=1"], "sed", "seed"),
        (["qlearning.bta=1"], "qlearning.bta", "beta"),
        (["data.max_prompt_token=9"], "data.max_prompt_token", "max_prompt_tokens"),
        (["data.limits.tran=9"], "data.limits.tran", "train"),
        (["data.conversation.colum=x"], "data.conversation.colum", "column"),
        (["model.from_scratch.vocab_size=500"], "model.from_scratch.vocab_size", "vocabulary_size"),
        ([*PRETRAINED, "model.lora.rnk=4"], "model.lora.rnk", "rank"),
        (["warm_start.epoch=4"], "warm_start.epoch", "epochs"),
    ],
)
def test_unknown_key_names_the_nearest(
    write_recipe: WriteRecipe, overrides: list[str], unknown: str, meant: str
) -> None:
    sentence = refusal(write_recipe(SMALLEST), *overrides)
    assert f"unknown key {unknown!r}" in sentence
    assert sentence.endswith(f"did you mean {meant!r}?")


def test_unknown_key_like_no_other_lists_the_few_there_are(write_recipe: WriteRecipe) -> None:
    sentence = refusal(write_recipe(SMALLEST), "data.splits.zzz=1")
    assert "'data.splits.zzz'" in sentence
    assert sentence.endswith("there are train, validation, test")


def test_nearest_is_silent_when_choices_are_many_and_none_is_near() -> None:
    assert nearest("zzz", [f"key{i}" for i in range(21)]) == ""


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["qlearning.max_steps=many"], "qlearning.max_steps", "'many'"),
        (["qlearning.max_steps=2.5"], "qlearning.max_steps", "2.5"),
        (["qlearning.gamma=0"], "qlearning.gamma", "0"),
        (["qlearning.form=dqn"], "qlearning.form", "'dqn'"),
        (["seed=-1"], "seed", "-1"),
        (["data.limits.train=0"], "data.limits.train", "0"),
        (["optimisation.adam_betas=[0.9, 1.5]"], "optimisation.adam_betas", "1.5"),
        (["reward.mix.bleu=.nan"], "reward.mix.bleu", "nan"),
        (["qlearning.beta=.inf"], "qlearning.beta", "inf"),
        (["model.from_scratch.vocabulary_size=10"], "model.from_scratch.vocabulary_size", "10"),
        (["reward.mix=bleu"], "reward.mix", "'bleu'"),
        (["reward.mix.bleu=high"], "reward.mix.bleu", "'high'"),
        (["reward=null"], "reward", "None"),
        (["output=null"], "output", "None"),
        (["data.chat=perhaps"], "data.chat", "'perhaps'"),
        ([*PRETRAINED, "model.lora.target_modules=3"], "model.lora.target_modules", "3"),
    ],
)
def test_wrong_value_names_key_and_value(write_recipe: WriteRecipe, overrides: list[str], key: str, value: str) -> None:
    file = write_recipe(SMALLEST)
    sentence = refusal(file, *overrides)
    assert sentence.startswith(f"{file}: {key}: ")
    assert sentence.endswith(f"not {value}")


def test_wrong_choice_names_the_right_ones(write_recipe: WriteRecipe) -> None:
    sentence = refusal(write_recipe(SMALLEST), "qlearning.form=dqn")
    assert "'dueling'" in sentence
    assert "'classic'" in sentence


@pytest.mark.parametrize("section", ["model", "data"])
def test_missing_section(write_recipe: WriteRecipe, section: str) -> None:
    tree = {name: part for name, part in SMALLEST.items() if name != section}
    assert refusal(write_recipe(tree)).endswith(f"{section!r} is missing")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.name=some/model"], ["exactly one of", "model.name", "model.from_scratch"]),
        (["model.from_scratch=null"], ["exactly one of", "model.name", "model.from_scratch"]),
        (["model.lora.rank=4"], ["model.lora", "from_scratch"]),
        (["data.hub=some/data"], ["only one of", "data.path", "data.hub"]),
        (["data.system=Be brief."], ["data.system", "data.chat=true"]),
        (["data.references=null"], ["'bleu'", "data.references"]),
        (["data.references=null", "reward.mix={repetition: -1, length: 1}"], ["'length'", "data.references"]),
        (
            ["data.references=null", "reward.mix={repetition: -1}", "warm_start.epochs=1"],
            ["warm_start", "data.references"],
        ),
        (
            ["data.references=null", "reward.mix={repetition: -1}", "replay.demonstrations=1"],
            ["replay.demonstrations", "data.references"],
        ),
        (["qlearning.loss=path", "qlearning.form=classic"], ["qlearning.loss=path", "qlearning.form=dueling"]),
        (["qlearning.target_polyak=null"], ["target", "qlearning.target_polyak", "target_copy_every"]),
        (["qlearning.target_dtype=bfloat16"], ["qlearning.target_dtype", "target_polyak", "target_copy_every"]),
        (
            [*PRETRAINED, "model.lora.rank=4", *HALF_TARGET],
            ["qlearning.target_dtype=bfloat16", "model.lora", "adapter"],
        ),
        (["rollout.samples=1"], ["qlearning.baseline=group", "rollout.samples"]),
        (
            ["rollout.samples=1", "qlearning.baseline=none", "qlearning.loss=path"],
            ["qlearning.loss=path", "rollout.samples"],
        ),
        (["qlearning.loss=path", "qlearning.backup=hard"], ["qlearning.loss=path", "qlearning.backup=hard", "soft"]),
        (["qlearning.loss=path", "qlearning.n_step=3"], ["qlearning.n_step", "loss=td"]),
        (["qlearning.loss=path", "qlearning.actor=1"], ["qlearning.actor", "loss=td"]),
        (["qlearning.loss=path", "qlearning.importance=token"], ["qlearning.importance=token", "importance=episode"]),
        (["qlearning.path_value=network"], ["qlearning.path_value=network", "qlearning.loss=path"]),
        (["qlearning.backup_top_k=5"], ["qlearning.backup_top_k", "qlearning.backup=soft"]),
        (["qlearning.loss=path", "qlearning.value_trace=0.9"], ["qlearning.value_trace", "loss=td"]),
        (["qlearning.value_quantiles=5", "qlearning.form=calibrated"], ["qlearning.value_quantiles", "dueling"]),
        (["qlearning.value_trace=0.9", "qlearning.form=classic"], ["qlearning.value_trace", "dueling"]),
        (["qlearning.supervised=1"], ["qlearning.supervised", "replay.demonstrations"]),
        (
            ["qlearning.importance=token", "replay.demonstrations=1"],
            ["qlearning.importance=token", "replay.demonstrations"],
        ),
        (["rollout.epsilon_start=0.5"], ["rollout.epsilon_start", "rollout.epsilon_greedy=true"]),
        (
            ["rollout.epsilon_greedy=true", "rollout.temperature=0.7"],
            ["rollout.temperature=0.7", "rollout.epsilon_greedy=true", "temperature=1", "epsilon_greedy=false"],
        ),
        (["offline={path: x}", "replay.demonstrations=1"], ["replay.demonstrations", "offline.rounds=0"]),
        (["replay.sampling=prioritised"], ["replay.sampling=prioritised", "replay.fresh_share"]),
        (["replay.learning_starts_episodes=5000"], ["replay.learning_starts_episodes", "replay.capacity_episodes"]),
        (["offline={path: x, rounds: 2}"], ["offline.rounds", "replay.fresh_share"]),
        (["offline={path: x}", "rollout.overlap_scoring=true"], ["rollout.overlap_scoring", "offline"]),
        (
            ["offline={path: x, boltzmann_js_nats: 0.1}", "qlearning.form=classic"],
            ["offline.boltzmann_js_nats", "qlearning.form=classic"],
        ),
        (
            ["optimisation.torch_compile=true", "optimisation.gradient_checkpointing=true"],
            ["optimisation.torch_compile", "gradient_checkpointing=false"],
        ),
        (["reward.mix={}"], ["reward.mix", "at least one"]),
        (["reward.mix={rougel: 1}"], ["reward.mix", "'rougel'", "did you mean 'rougeL'?"]),
    ],
)
def test_impossible_pair_is_named(write_recipe: WriteRecipe, overrides: list[str], named: list[str]) -> None:
    file = write_recipe(SMALLEST)
    sentence = refusal(file, *overrides)
    assert sentence.startswith(str(file))
    for words in named:
        assert words in sentence


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.references=null", "reward.mix={repetition: -1, 'my_module:my_reward': 1}"],
        ["data.references=null", "data.conversation.column=dialog"],
        ["qlearning.target_polyak=null", "qlearning.target_copy_every=10"],
        ["rollout.samples=1", "qlearning.baseline=running"],
        ["rollout.samples=1", "replay.demonstrations=1", "qlearning.baseline=none"],
        ["qlearning.form=classic", "qlearning.loss=td"],
        ["qlearning.form=classic", "qlearning.backup=soft", "qlearning.trace=0.5"],
        ["rollout.samples=1", "qlearning.baseline=none", "qlearning.loss=path", "qlearning.path_value=network"],
        ["data.chat=true", "data.system=Be brief."],
        ["rollout.epsilon_greedy=true", "rollout.epsilon_start=0.5", "rollout.temperature=1"],
        [*PRETRAINED, "model.lora.rank=4"],
    ],
)
def test_possible_pair_is_taken(write_recipe: WriteRecipe, overrides: list[str]) -> None:
    assert isinstance(load_recipe(write_recipe(SMALLEST), overrides), Recipe)


def test_the_classic_form_is_the_textbooks_unless_told(write_recipe: WriteRecipe) -> None:
    file = write_recipe(SMALLEST)
    default, classic = (load_recipe(file, [f"qlearning.form={form}"]).qlearning for form in ("dueling", "classic"))
    assert (default.backup, default.trace) == ("soft", 0.95)
    assert (classic.backup, classic.trace) == ("hard", 0.0)
    assert load_recipe(file, ["qlearning.form=classic", "qlearning.trace=0.5"]).qlearning.trace == 0.5


@pytest.mark.parametrize("override", ["qlearning.max_steps", "=3", ""])
def test_malformed_override(write_recipe: WriteRecipe, override: str) -> None:
    sentence = refusal(write_recipe(SMALLEST), override)
    assert f"override {override!r} must read key=value" in sentence


def test_override_that_is_not_yaml(write_recipe: WriteRecipe) -> None:
    assert "'seed=[1'" in refusal(write_recipe(SMALLEST), "seed=[1")


def test_override_below_a_value(write_recipe: WriteRecipe) -> None:
    sentence = refusal(write_recipe({**SMALLEST, "seed": 3}), "seed.of.rollout=1")
    assert "'seed.of.rollout=1'" in sentence
    assert "seed is a value" in sentence


def test_missing_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.yaml") == f"cannot read the recipe {tmp_path}/none.yaml: No such file or directory"


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"model: \xff\xfe")
    assert f"cannot read the recipe {tmp_path}/recipe.yaml" in refusal(tmp_path / "recipe.yaml")


def test_broken_yaml_names_the_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model:\n\tfrom_scratch: {}\n", encoding="utf-8")
    sentence = refusal(tmp_path / "recipe.yaml")
    assert sentence.startswith(f"{tmp_path}/recipe.yaml is not valid YAML")
    assert "line 2, column 1" in sentence


@pytest.mark.parametrize(("text", "kind"), [("- model\n- data\n", "list"), ("train it\n", "str"), ("", "NoneType")])
def test_yaml_that_is_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert refusal(tmp_path / "recipe.yaml").endswith(f"must hold sections such as model: and data:, not {kind}")


def test_overrides_change_nested_values_and_the_last_one_counts(write_recipe: WriteRecipe) -> None:
    file = write_recipe({**SMALLEST, "qlearning": {"beta": 0.5, "gamma": 0.9}})
    recipe = load_recipe(file, ["qlearning.beta=0.25", "data.limits.train=7", "seed=3", "seed=4"])
    assert (recipe.qlearning.beta, recipe.qlearning.gamma) == (0.25, 0.9)
    assert recipe.only_task.data.limits.train == 7
    assert recipe.only_task.data.path == "folder"
    assert recipe.seed == 4


def test_overrides_create_sections(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(SMALLEST), ["warm_start.epochs=2", "data.conversation.history=3"])
    assert recipe.warm_start is not None
    assert recipe.warm_start.epochs == 2
    assert recipe.only_task.data.conversation is not None
    assert recipe.only_task.data.conversation.history == 3


def test_override_null_drops_a_section(write_recipe: WriteRecipe) -> None:
    file = write_recipe({**SMALLEST, "warm_start": {"epochs": 2}})
    assert load_recipe(file).warm_start is not None
    assert load_recipe(file, ["warm_start=null"]).warm_start is None


def test_exponents_without_a_point_are_numbers(write_recipe: WriteRecipe) -> None:
    """YAML 1.1 takes 1e-4 for text."""
    recipe = load_recipe(write_recipe(SMALLEST), ["optimisation.learning_rate=1e-4", "reward.mix.bleu=1e0"])
    assert recipe.optimisation.learning_rate == 0.0001
    assert recipe.only_task.reward.mix == {"bleu": 1.0}


def test_exponents_are_numbers_in_free_form_settings_too(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(SMALLEST), ["model.from_scratch.config.layer_norm_epsilon=1e-4"])
    assert recipe.model.from_scratch is not None
    assert recipe.model.from_scratch.config == {"layer_norm_epsilon": 0.0001}


def test_values_may_hold_equals_signs(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(SMALLEST), ["data.prompt='a=b: {source}'"])
    assert recipe.only_task.data.prompt == "a=b: {source}"


@pytest.mark.parametrize(
    "text",
    [
        "summarize: {source}",
        "### Instruction {source}",
        "Text {source} # Summary",
        "Q: {source} A:",
        "2024",
        "012",
        "no",
    ],
)
@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"'])
@pytest.mark.parametrize("key", ["data.prompt", "tasks.first.data.prompt"])
def test_text_is_taken_as_it_stands(write_recipe: WriteRecipe, text: str, form: str, key: str) -> None:
    task = {"data": SMALLEST["data"], "reward": {}}
    several = {"model": SMALLEST["model"], "tasks": {"first": task}}
    recipe = load_recipe(write_recipe(several if "tasks" in key else SMALLEST), [f"{key}={form.format(text)}"])
    assert next(iter(recipe.every_task.values())).data.prompt == text


@pytest.mark.parametrize("text", ['"{source}" in "English"', "'tis {source}", '"'])
def test_quotes_that_are_no_yaml_are_text(write_recipe: WriteRecipe, text: str) -> None:
    assert load_recipe(write_recipe(SMALLEST), [f"data.prompt={text}"]).only_task.data.prompt == text


def test_text_that_is_null_or_has_escapes(write_recipe: WriteRecipe) -> None:
    file = write_recipe(SMALLEST)
    assert load_recipe(file, ["data.prompt=x", "data.prompt=null"]).only_task.data.prompt is None
    assert load_recipe(file, [r'data.prompt="a\n{source}"']).only_task.data.prompt == "a\n{source}"


def test_a_choice_is_text_whatever_yaml_makes_of_it(write_recipe: WriteRecipe) -> None:
    """no is False in YAML 1.1."""
    assert load_recipe(write_recipe(SMALLEST), ["optimisation.mixed_precision=no"]).optimisation.mixed_precision == "no"


def test_tilde_is_the_users_home(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(write_recipe(SMALLEST), ["data.path=~/pairs", "output.dir=~/runs/x"])
    assert recipe.only_task.data.path == "/home/someone/pairs"
    assert recipe.output.dir == "/home/someone/runs/x"


def test_a_section_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    text = "model: {from_scratch: {}}\nqlearning: {beta: 0.1}\ndata: {path: x}\nqlearning: {gamma: 0.9}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    sentence = refusal(tmp_path / "recipe.yaml")
    assert "'qlearning' stands there twice" in sentence
    assert "line 4, column 1" in sentence


def test_a_key_that_is_a_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {path: x, prompt: {{source}}}\n", encoding="utf-8")
    assert "is not valid YAML" in refusal(tmp_path / "recipe.yaml")


def test_a_merge_that_is_overridden_stands_there_once(tmp_path: Path) -> None:
    text = "model: {from_scratch: {config: {<<: &a {n_layer: 1}, n_layer: 2}}}\ndata: {path: x}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    scratch = load_recipe(tmp_path / "recipe.yaml").model.from_scratch
    assert scratch is not None
    assert scratch.config == {"n_layer": 2}


@pytest.mark.parametrize("metric", ["length_words", "distinct2", "repeated_4grams"])
def test_a_metric_that_is_no_gain_chooses_no_model(write_recipe: WriteRecipe, metric: str) -> None:
    """But what a run of an earlier version chose by it can be read."""
    recipe = load_recipe(write_recipe(SMALLEST), [f"evaluation.metric={metric}"])
    with pytest.raises(UserError, match=f"evaluation.metric={metric} is no gain by itself"):
        recipe.check_new()


def test_override_names_a_reward_of_the_users_own(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(SMALLEST), ["reward.mix.my_rewards:polite=0.25"])
    assert recipe.only_task.reward.mix == {"my_rewards:polite": 0.25}


def test_keys_that_other_tools_may_rely_on(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(
        write_recipe(SMALLEST),
        ["seed=11", "data.path=there", "output.dir=runs/new", "qlearning.max_steps=12", "qlearning.max_seconds=1.5"],
    )
    assert recipe.seed == 11
    assert recipe.only_task.data.path == "there"
    assert recipe.output.dir == "runs/new"
    assert recipe.qlearning.max_steps == 12
    assert recipe.qlearning.max_seconds == 1.5


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            *PRETRAINED,
            "model.lora.target_modules=[q, v]",
            "warm_start.epochs=0.5",
            "optimisation.adam_betas=[0.8, 0.9]",
        ],
        ["data.chat=true", "data.system='Fasse «kurz»: 要約'", "data.conversation.history=2"],
        ["reward.mix={'a.py:f': -0.001, bleu: 1}", "model.from_scratch.config={n_layer: 1, activation: null}"],
    ],
)
def test_a_dumped_recipe_loads_as_the_same(write_recipe: WriteRecipe, tmp_path: Path, overrides: list[str]) -> None:
    recipe = load_recipe(write_recipe(SMALLEST), overrides)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_a_dumped_recipe_writes_out_every_default(write_recipe: WriteRecipe) -> None:
    recipe = load_recipe(write_recipe(SMALLEST))
    tree = yaml.safe_load(dump_recipe(recipe))
    assert list(tree) == list(Recipe.model_fields)
    assert list(tree["qlearning"]) == list(type(recipe.qlearning).model_fields)


def test_a_recipe_never_changes() -> None:
    recipe = validate(SMALLEST, "here")
    with pytest.raises(ValueError, match="frozen"):
        recipe.qlearning.beta = 3.0  # type: ignore[misc]


def sections() -> Iterator[type[Section]]:
    waiting: list[type[Section]] = [Section]
    while waiting:
        section = waiting.pop()
        yield section
        waiting += section.__subclasses__()


@pytest.mark.parametrize("section", [s for s in sections() if s is not Section], ids=lambda s: s.__name__)
def test_every_field_is_described(section: type[Section]) -> None:
    """By its own description, or a field that is a whole section by that section's docstring."""

    def description(field: FieldInfo) -> str:
        is_section = isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        return field.description or (is_section and field.annotation.__doc__) or ""

    assert section.model_fields
    assert [name for name, field in section.model_fields.items() if not description(field).strip()] == []


# --- shipped recipes ----------------------------------------------------------------------------------------------


def header(file: Path) -> list[str]:
    """The comment lines that open a recipe, without their marks."""
    lines = file.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.lstrip("#").strip() for line in lines[:count]]


def test_recipes_are_shipped() -> None:
    assert shipped_recipes()


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_loads_and_says_what_it_is(name: str) -> None:
    file = shipped_recipes()[name]
    load_recipe(file)
    lines = header(file)
    assert re.fullmatch(r"[A-Z].* .*\.", lines[0])
    assert describe(file) == lines[0]
    assert any(line.startswith("Measured") or "Not run" in line for line in lines)
    assert not any("MEASURED" in line for line in lines)  # a blank that was never filled in


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_holds_its_command(name: str) -> None:
    runs = []
    for line in header(shipped_recipes()[name]):
        match shlex.split(line) if line.startswith("lmdqn ") else []:
            case [_, "train", recipe, *overrides] if all("=" in override for override in overrides):
                runs.append(recipe)
            case [_, "quickstart"]:
                runs.append("quickstart_summarisation")
            case [_, "quickstart", task]:
                runs.append(f"quickstart_{task}")
    assert name in runs


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_is_found_by_name(name: str) -> None:
    assert find_recipe(name) == find_recipe(f"{name}.yaml") == shipped_recipes()[name]


def test_unknown_recipe_names_the_nearest() -> None:
    name = next(iter(shipped_recipes()))
    with pytest.raises(UserError, match=rf"shipped recipe '{name}x'; did you mean '{name}'\?"):
        find_recipe(f"{name}x")


def test_a_file_goes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(shipped_recipes()))
    (tmp_path / name).write_text("seed: 1", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == Path(name)
