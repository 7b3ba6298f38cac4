"""What a run tells TensorBoard and the other trackers, read back from their own files."""

import importlib
import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lmdqn
from lmdqn.errors import Stopped, UserError
from lmdqn.recipe import Recipe
from lmdqn.results.trackers import Trackers, check_installed
from lmdqn.results.tracking import Tracker


@pytest.fixture
def recipe(tmp_path: Path, write_data: Callable[..., Path]) -> Recipe:
    gpt2 = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64}
    return Recipe.model_validate(
        {
            "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": gpt2}},
            "data": {"path": str(write_data()), "max_response_tokens": 8},
            "warm_start": {"epochs": 4, "batch_examples": 3},
            "rollout": {"prompts": 2, "samples": 2},
            "replay": {"batch_groups": 2},
            "qlearning": {"max_steps": 4},
            "evaluation": {"every_steps": 2, "bootstrap_samples": 100},
            "output": {
                "dir": str(tmp_path / "run"),
                "log_every_steps": 1,
                "trackers": ["tensorboard"],
                "tracked_samples": 2,
            },
        }
    )


def test_tensorboard_gets_what_metrics_jsonl_gets(recipe: Recipe) -> None:
    folder = lmdqn.train(recipe).folder
    told = EventAccumulator(str(folder.path / "trackers" / "lmdqn"))
    told.Reload()
    lines = [json.loads(line) for line in folder.metrics.read_text(encoding="utf-8").splitlines()]
    written: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        step = line["step"] + (4 if line["phase"] == "dqn" else 0)  # after the four steps of MLE
        for key, value in line.items():
            if key != "phase":
                written.setdefault(f"{line['phase']}/{key}", []).append((step, value))
    assert {"mle/loss", "dqn/loss", "dqn/validation_bleu"} <= set(written)
    assert set(told.Tags()["scalars"]) == set(written)
    for key, values in written.items():
        assert [event.step for event in told.Scalars(key)] == [step for step, _ in values], key
        assert [event.value for event in told.Scalars(key)] == pytest.approx([v for _, v in values], rel=1e-4), key
    texts = told.Tensors("validation samples/text_summary")
    assert [event.step for event in texts] == [4, 6, 8]  # each validation, the one before the first step too
    table = texts[-1].tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "| source | reference | response |"
    assert len(table) == 2 + 2
    assert table[2].startswith("| copy the word ")
    assert not folder.is_barely_begun()
    for path in set(folder.path.iterdir()) - {folder.recipe, folder.metrics, folder.trackers}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert folder.is_barely_begun()  # a run that stopped this early starts again with --resume


def test_a_run_without_trackers_keeps_no_folder_for_them(recipe: Recipe) -> None:
    output = recipe.output.model_copy(update={"trackers": []})
    qlearning = recipe.qlearning.model_copy(update={"max_steps": 0})
    run = lmdqn.train(recipe.model_copy(update={"output": output, "qlearning": qlearning, "warm_start": None}))
    assert not (run.folder.path / "trackers").exists()


def test_a_missing_package_is_named_before_anything_is_written(recipe: Recipe) -> None:
    output = recipe.output.model_copy(update={"trackers": ["tensorboard", "clearml"]})
    with pytest.raises(UserError, match="clearml is not installed: pip install clearml"):
        lmdqn.train(recipe.model_copy(update={"output": output}))
    assert not Path(recipe.output.dir).exists()
    check_installed(["tensorboard"])


def test_a_resumed_runs_steps_go_on(recipe: Recipe, tmp_path: Path) -> None:
    lines = [{"phase": "mle", "step": 4}, {"phase": "dqn", "step": 0}, {"phase": "dqn", "step": 3}]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    listener = Listener("mlflow")
    output = recipe.output.model_copy(update={"trackers": []})
    trackers = Trackers(listener, recipe.model_copy(update={"output": output}))
    trackers.start(metrics, resume=True)
    trackers.log("dqn", {"step": 4})
    assert listener.logged == [(8, {"dqn/step": 4})]


class StopAt(Tracker):
    """Sends this process a signal when a step of DQN is logged."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def log(self, phase: str, record: dict[str, Any], write: bool = True) -> None:
        super().log(phase, record, write)
        if (phase, record["step"]) == ("dqn", self.step):
            signal.raise_signal(signal.SIGTERM)


FAKE = """
import itertools
CALLS, IDS = [], itertools.count(1)

class Run:
    def __init__(self, id):
        self.id = id
    def log(self, values, step=None, **more):
        CALLS.append(("log", self.id, step))
    def finish(self):
        CALLS.append(("finish", self.id))

class config:
    @staticmethod
    def update(values, **more): ...

class Table:
    def __init__(self, **content): ...

def init(project, name, id=None, resume=None):
    run = Run(id or f"id{next(IDS)}")
    CALLS.append(("init", project, name, id, resume))
    return run
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Packages called wandb and trackio that Accelerate finds, and the calls they got."""
    calls = {}
    (tmp_path / "fakes").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "fakes"))
    for name in ("wandb", "trackio"):
        (tmp_path / "fakes" / f"{name}.py").write_text(FAKE)
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)  # dropped afterwards
        calls[name] = module.CALLS
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB, LoggerType.TRACKIO])
    return calls


def test_a_signal_closes_the_trackers_and_a_resumed_run_goes_on_in_theirs(
    recipe: Recipe, fakes: dict[str, list[Any]]
) -> None:
    output = recipe.output.model_copy(update={"trackers": ["wandb", "trackio"]})
    recipe = recipe.model_copy(update={"output": output})
    with pytest.raises(Stopped):
        lmdqn.train(recipe, StopAt(2))
    lmdqn.train(recipe, resume=True)
    wandb, trackio = fakes["wandb"], fakes["trackio"]
    assert [call for call in wandb if call[0] != "log"] == [
        ("init", "lmdqn", "run", None, None),
        ("finish", "id1"),
        ("init", "lmdqn", "run", "id1", "allow"),
        ("finish", "id1"),
    ]
    steps = [call[2] for call in wandb if call[0] == "log" and call[2] is not None]
    assert steps == sorted(steps)
    assert set(steps) == set(range(1, 9))  # four of MLE, four of DQN, none of them begun anew
    assert [call[3:] for call in trackio if call[0] == "init"] == [(None, None), (None, "allow")]
    assert sum(call[0] == "finish" for call in trackio) == 2


def test_an_error_closes_the_trackers(recipe: Recipe, fakes: dict[str, list[Any]], tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def score(responses, references, sources):\n    raise ValueError('no luck')\n")
    output = recipe.output.model_copy(update={"trackers": ["wandb"]})
    reward = recipe.only_task.reward.model_copy(update={"mix": {f"{tmp_path}/bad.py:score": 1.0}})
    with pytest.raises(UserError, match="no luck"):
        lmdqn.train(recipe.model_copy(update={"output": output, "reward": reward}))
    assert fakes["wandb"][-1] == ("finish", "id1")


class Listener:
    """Stands for an Accelerator with one tracker, and for the tracker."""

    def __init__(self, name: str):
        self.name = name
        self.trackers = [self]
        self.logged: list[Any] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))


class TableListener(Listener):
    def log_table(self, name: str, columns: list[str], data: list[list[str]], step: int) -> None:
        self.logged.append((step, name, columns, data))


SAMPLES = [("a | b\nc", "r", "x"), ("s", "r", "y"), ("left out", "r", "z")]


def told_to(listener: Listener, recipe: Recipe) -> list[Any]:
    trackers = Trackers(listener, recipe)
    trackers.log("dqn", {"step": 3, "loss": 0.5, "note": "no number"})
    trackers.show(SAMPLES)
    trackers.log("dqn", {"step": 4, "loss": 0.25})
    trackers.log("dqn", {"step": 5, "loss": 0.125})
    return listener.logged


def test_samples_go_out_once_as_each_tracker_takes_them(recipe: Recipe) -> None:
    numbers = [(step, {"dqn/step": step, "dqn/loss": loss}) for step, loss in ((3, 0.5), (4, 0.25), (5, 0.125))]
    table = (4, "validation samples", ["source", "reference", "response"], [list(SAMPLES[0]), list(SAMPLES[1])])
    assert told_to(TableListener("wandb"), recipe) == [*numbers[:2], table, numbers[2]]
    markdown = "| source | reference | response |\n| --- | --- | --- |\n| a \\| b c | r | x |\n| s | r | y |"
    text = (4, {"validation samples": markdown})
    assert told_to(Listener("tensorboard"), recipe) == [*numbers[:2], text, numbers[2]]
    assert told_to(Listener("mlflow"), recipe) == numbers  # it takes numbers alone
