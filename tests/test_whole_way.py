"""Runs from the command line, start to finish, on tiny models and data: each kind must beat its own start."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmdqn
from lmdqn.recipe import load_recipe
from lmdqn.results.tracking import LOGGED
from tests.conftest import Ran
from tests.runs import Rows, write_splits

ANIMALS = ("cat", "dog", "cow", "hen", "fox", "owl")
PLACES = ("barn", "yard", "wood", "lake", "hill")
Changes = dict[str, object]
Train = Callable[..., dict[str, dict[str, dict[str, float]]]]
SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 48, "n_head": 4, "n_positions": 64},
    "t5": {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
}


def lmdqn_command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own, without network."""
    return subprocess.run(
        [sys.executable, "-m", "lmdqn", *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose references vary in wording, so that likelihood spreads and the reward has a favourite."""
    folder = tmp_path_factory.mktemp("farm")
    draw = random.Random(0)
    pairs = [(animal, place) for animal in ANIMALS for place in PLACES]
    draw.shuffle(pairs)
    splits: dict[str, Rows] = {}
    for split, part in (("train", pairs[:20]), ("validation", pairs[20:25]), ("test", pairs[20:])):
        rows = []
        for animal, place in part:
            wordings = [f"the {animal} is in the {place}", f"the {animal} sleeps in the {place}"]
            wordings.append(draw.choice([f"we saw a {animal} near the {place}", f"look, a {animal} at the {place}"]))
            rows.append({"source": f"{animal} {place}", "references": wordings})
        splits[split] = rows
    return write_splits(folder, (), **splits)


def write_recipe(folder: Path, data: Path, family: str = "gpt2", **changes: Changes) -> Path:
    tree: dict[str, dict[str, object] | int] = {
        "seed": 1,
        "model": {"from_scratch": {"family": family, "vocabulary_size": 300, "config": SIZES[family]}},
        "data": {"path": str(data), "max_response_tokens": 24},
        "warm_start": {"epochs": 25, "learning_rate": 3e-3, "batch_examples": 8},
        "rollout": {"prompts": 8, "samples": 4},
        "replay": {"batch_groups": 8},
        "qlearning": {"max_steps": 40, "beta": 0.02},
        "optimisation": {"learning_rate": 1e-3},
        "evaluation": {"every_steps": 10},
        "output": {"dir": str(folder / "run")},
    }
    for section, values in changes.items():
        before = tree.get(section, {})
        assert isinstance(before, dict)
        tree[section] = {**before, **values}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


@pytest.fixture
def train(command_line: Callable[..., Ran]) -> Train:
    """`train(recipe, override, ...)` from the command line in this process; gives `results.json`."""

    def run(recipe: Path, *overrides: str) -> dict[str, dict[str, dict[str, float]]]:
        done = command_line("train", recipe, *overrides)
        assert done.code == 0, done.err
        return json.loads((recipe.parent / "run" / "results.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="session")
def causal_run(farm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished causal run that later tests look at."""
    recipe = write_recipe(tmp_path_factory.mktemp("causal"), farm)
    done = lmdqn_command("train", str(recipe))
    assert done.returncode == 0, done.stderr
    return recipe.parent / "run"


def test_causal_full_weights_beats_its_start(causal_run: Path) -> None:
    test = json.loads((causal_run / "results.json").read_text(encoding="utf-8"))["test"]
    assert test["mle"]["reward"] > test["start"]["reward"]
    assert test["dqn"]["reward"] > test["mle"]["reward"]


KINDS: dict[str, tuple[str, dict[str, Changes]]] = {
    "seq2seq": ("t5", {"warm_start": {"epochs": 8}, "optimisation": {"learning_rate": 2e-3}}),
    "path residual": ("gpt2", {"qlearning": {"loss": "path"}}),
    "one sample a prompt": ("gpt2", {"rollout": {"prompts": 32, "samples": 1}, "qlearning": {"baseline": "running"}}),
    "replay and demonstrations": (
        "gpt2",
        {"replay": {"fresh_share": 0.5, "updates_per_rollout": 2, "demonstrations": 1}, "qlearning": {"max_steps": 25}},
    ),
    "scoring overlaps the next rollout": ("gpt2", {"rollout": {"overlap_scoring": True}}),
    "hard target copies, Huber": (
        "gpt2",
        {
            "qlearning": {"target_polyak": None, "target_copy_every": 5, "huber_delta": 10.0},
            "replay": {"demonstrations": 2},
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_beats_its_start(kind: str, farm: Path, train: Train, tmp_path: Path) -> None:
    family, changes = KINDS[kind]
    test = train(write_recipe(tmp_path, farm, family, **changes))["test"]
    assert test["dqn"]["reward"] > test["mle"]["reward"]


def test_lora_on_a_saved_model_beats_its_start(
    farm: Path, causal_run: Path, train: Train, command_line: Callable[..., Ran], tmp_path: Path
) -> None:
    """Its start is a whole run's result, saved and loaded again; a reward of one's own gives it something to learn."""
    reward = tmp_path / "taste.py"
    reward.write_text("def short(responses, references, sources):\n    return [-len(r) / 50 for r in responses]\n")
    model: dict[str, object] = {
        "name": str(causal_run / "model"),
        "from_scratch": None,
        "lora": {"rank": 8, "alpha": 32},
    }
    recipe = write_recipe(
        tmp_path, farm, model=model, reward={"mix": {f"{reward}:short": 1.0}}, optimisation={"learning_rate": 4e-3}
    )
    results = train(recipe, "warm_start=null", "evaluation.metric=reward")
    assert set(results["test"]) == {"start", "dqn"}
    assert results["test"]["dqn"]["reward"] > results["test"]["start"]["reward"]
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()
    shown = command_line("generate", tmp_path / "run", "--source", "cat barn")
    assert shown.code == 0
    assert len(shown.out.splitlines()) == 1


def test_the_classic_form_and_epsilon_greedy_run(farm: Path, train: Train, tmp_path: Path) -> None:
    """The baseline to beat: it need not learn."""
    changes: dict[str, Changes] = {
        "qlearning": {"form": "classic", "max_steps": 5},
        "rollout": {"epsilon_greedy": True, "epsilon_start": 0.5, "epsilon_end": 0.1, "epsilon_decay_steps": 4},
        "output": {"log_every_steps": 1},
    }
    train(write_recipe(tmp_path, farm, "gpt2", **changes))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    epsilons = [line["epsilon"] for line in lines if line["phase"] == "dqn" and line["step"] > 0]
    assert epsilons == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])  # what each step explored by


def test_a_target_of_16_bits_learns_and_is_what_ships(farm: Path, train: Train, tmp_path: Path) -> None:
    settings: Changes = {"target_dtype": "bfloat16", "target_polyak": None, "target_copy_every": 5, "max_steps": 30}
    test = train(write_recipe(tmp_path, farm, qlearning=settings))["test"]
    assert test["dqn"]["reward"] > test["mle"]["reward"]
    for folder, dtype in (("model", torch.bfloat16), ("reference", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / folder, dtype="auto")
        assert model.dtype == dtype


def test_the_runs_folder_keeps_its_contract(causal_run: Path, farm: Path) -> None:
    assert {file.name for file in causal_run.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "results.json", "predictions.jsonl", "calibration.parquet", "report.html",
        "model", "last", "reference", "checkpoints",
    }  # fmt: skip
    assert load_recipe(causal_run / "recipe.yaml").only_task.data.path == str(farm)
    results = json.loads((causal_run / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"test", "interval", "p_value", "seconds", "peak_memory_mib", "environment"}
    for phase in ("start", "mle", "dqn"):
        assert {"bleu", "rouge1", "rouge2", "rougeL", "chrf", "length_words", "distinct2"} <= set(
            results["test"][phase]
        )
        low, high = results["interval"][phase]["rougeL"]
        assert low <= results["test"][phase]["rougeL"] <= high
    assert {"bleu", "rougeL", "reward", "length_words"} <= set(results["p_value"])
    assert {"mle", "dqn", "total"} == set(results["seconds"])
    lines = [json.loads(line) for line in (causal_run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    assert set(lines[0]) == {"source", "references", "start", "mle", "dqn", "scores"}
    assert {"reward", "rougeL"} <= set(lines[0]["scores"]["dqn"])


def test_every_logged_key_is_documented(causal_run: Path) -> None:
    prefixes = tuple(key.partition("<")[0] for key in LOGGED if "<" in key)
    for line in (causal_run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        for key in json.loads(line):
            assert key in LOGGED or key.startswith(prefixes), key


def test_the_model_gives_its_recorded_predictions_in_plain_transformers(causal_run: Path) -> None:
    """A fresh process needs nothing of lmdqn: `generate` as the folder configures it writes what was evaluated."""
    model = AutoModelForCausalLM.from_pretrained(causal_run / "model")
    tokenizer = AutoTokenizer.from_pretrained(causal_run / "model")
    for line in (causal_run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()[:5]:
        prediction = json.loads(line)
        inputs = tokenizer(prediction["source"] + "\n", return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs)[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(output, skip_special_tokens=True).strip() == prediction["dqn"]


def test_evaluate_repeats_the_runs_numbers(causal_run: Path, command_line: Callable[..., Ran], tmp_path: Path) -> None:
    done = command_line("evaluate", causal_run, "--output", tmp_path / "scores.json")
    assert done.code == 0, done.err
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["metrics"]
    results = json.loads((causal_run / "results.json").read_text(encoding="utf-8"))
    assert scores == pytest.approx(results["test"]["dqn"], abs=1e-3)


def test_an_existing_run_is_never_overwritten_untold(causal_run: Path, command_line: Callable[..., Ran]) -> None:
    before = {file: file.stat().st_mtime_ns for file in causal_run.rglob("*")}
    done = command_line("train", causal_run.parent / "recipe.yaml")
    assert done.code == 2
    assert "already holds a run" in done.err
    assert before == {file: file.stat().st_mtime_ns for file in causal_run.rglob("*")}


def test_the_same_seed_gives_the_same_run(farm: Path, tmp_path: Path) -> None:
    """Weights and metrics, from Python."""
    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name, farm, warm_start={"epochs": 2}, qlearning={"max_steps": 4})
        result = lmdqn.train(lmdqn.load_recipe(recipe))
        weights.append(AutoModelForCausalLM.from_pretrained(result.folder.model).state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=0)


def test_check_writes_nothing_and_estimates_memory(farm: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, farm)
    before = sorted(tmp_path.rglob("*"))
    done = lmdqn_command("check", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "max_steps: 40" in done.stdout
    assert "data: 20 train, 5 validation, 10 test" in done.stdout
    parameters = sum(p.numel() for p in _scratch_model(recipe).parameters())
    assert f"memory: {parameters:,} parameters" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def _scratch_model(recipe: Path) -> torch.nn.Module:
    from lmdqn.model.loading import load_model

    return load_model(load_recipe(recipe).model, ["a word " * 400 + "".join(map(chr, range(33, 300)))], 0, 8).model
