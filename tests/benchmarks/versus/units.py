"""Units of work: one method's run on one task with one setting and one seed, each with its own result file."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from speed.table import CLOCKS

from lmdqn.errors import UserError
from lmdqn.learn.budget import Budget
from lmdqn.recipe import Recipe
from lmdqn.results.evaluate import Evaluation
from lmdqn.whole_files import write_whole
from versus.arena import NO_LIMIT, Arena, Recorder, Settings, Task, Variant
from versus.methods import run_best_of_group, run_lean_grpo, run_lmdqn, run_more_mle
from versus.trl_runs import run_trl_grpo, run_trl_rloo

Result = dict[str, Any]
TUNING_SEED = 0  # runs that choose the rate; they are not among the runs that are compared
KEPT_SCORES = ("reward", "rouge2", "rougeL")  # of each test response, for the bootstrap


@dataclass(frozen=True)
class Method:
    """A column of the comparison: how it runs, and the settings it is tuned over where nothing else is said."""

    title: str
    run: Callable[[Arena, Recipe, Recorder], None]
    rates: tuple[float, ...]
    schedule: str | None = None  # of the learning rate; None is the recipe's own
    architectures: tuple[str, ...] = ("causal", "seq2seq")


METHODS = {
    "lmdqn": Method("lmdqn", run_lmdqn, (1e-4, 2e-4, 4e-4, 8e-4)),
    "trl_grpo": Method("TRL GRPO", run_trl_grpo, (5e-5, 1e-4, 2e-4, 5e-4), "linear", ("causal",)),
    "trl_rloo": Method("TRL RLOO", run_trl_rloo, (5e-5, 1e-4, 2e-4, 5e-4), "linear", ("causal",)),
    "lean_grpo": Method("lean GRPO", run_lean_grpo, (5e-5, 1e-4, 2e-4, 5e-4)),
    "best_of_group": Method("best-of-group MLE", run_best_of_group, (5e-5, 1e-4, 2e-4, 5e-4)),
    "more_mle": Method("more MLE", run_more_mle, (5e-5, 1e-4, 2e-4, 5e-4)),
}


@dataclass(frozen=True)
class Setting:
    """What is tuned."""

    rate: float
    schedule: str

    def __str__(self) -> str:
        return f"{self.rate:.0e} {self.schedule}"


@dataclass(frozen=True)
class Unit:
    task: Task
    method: str
    setting: Setting
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.method} {self.setting} seed {self.seed}"

    def file(self, settings: Settings) -> Path:
        name = f"{self.method}-{self.setting.rate:g}-{self.setting.schedule}-seed{self.seed}.json"
        return self.task.folder(settings) / "units" / name


@dataclass
class Bench:
    """Runs units and keeps what they gave; a unit whose file is there is read, not run."""

    settings: Settings
    say: Callable[[str], None] = print
    _arenas: dict[Task, Arena] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UserError where the output folder holds results of other settings."""
        ours = {
            "seconds": self.settings.seconds,
            "evaluations": self.settings.evaluations,
            "threads": self.settings.threads,
            "clock": self.settings.clock,
            "overrides": list(self.settings.overrides),
            "lora": self.settings.lora,
        }
        file = self.settings.output / "settings.json"
        if file.exists() and (theirs := json.loads(file.read_text(encoding="utf-8"))) != ours:
            raise UserError(f"{file} says {theirs}, not {ours}: choose another --output")
        write_json(file, ours)
        Budget.clock = staticmethod(CLOCKS[self.settings.clock])

    def result(self, unit: Unit) -> Result:
        """The unit's result, from its file or from running it now."""
        file = unit.file(self.settings)
        if not file.exists():
            arena = self._arena(unit.task)
            self.say(f"{unit} ...")
            write_json(file, self._run(unit, arena))
        return read_json(file)

    def start(self, task: Task) -> Result:
        """The warm start's own result, in the form of a unit's."""
        self._check_data(task)
        file = task.folder(self.settings) / "units" / "start.json"
        if not file.exists():
            arena = self._arena(task)
            weights = Variant(arena.decoder.model).weights()
            validation, test = (arena.evaluate(weights, split) for split in ("validation", "test"))
            point = {"seconds": 0.0, "episodes": 0, **validation.metrics}
            write_json(file, {"curves": {"online": [point]}, "test": {"online": {"last": _kept(test)}}})
        return read_json(file)

    def _check_data(self, task: Task) -> None:
        """Raises UserError where the task's results are of other data."""
        files = sorted((self.settings.data / task.set).glob("*.jsonl"))
        ours = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        known = task.folder(self.settings) / "data.json"
        if known.exists() and json.loads(known.read_text(encoding="utf-8")) != ours:
            raise UserError(f"{known} is of other data than {self.settings.data / task.set}: choose another --output")
        write_json(known, ours)

    def _arena(self, task: Task) -> Arena:
        if task not in self._arenas:
            self._arenas = {task: Arena(task, self.settings)}  # one at a time in memory
        return self._arenas[task]

    def _run(self, unit: Unit, arena: Arena) -> Result:
        recipe = arena.recipe(
            f"seed={unit.seed}",
            f"optimisation.learning_rate={unit.setting.rate}",
            f"optimisation.schedule={unit.setting.schedule}",
            f"qlearning.max_seconds={self.settings.seconds}",
            f"qlearning.max_steps={NO_LIMIT}",
            f"evaluation.every_steps={NO_LIMIT}",
            "evaluation.patience=null",
        )
        torch.set_num_threads(self.settings.threads)
        recorder = Recorder(arena)
        METHODS[unit.method].run(arena, recipe, recorder)
        result: Result = {"curves": recorder.curves, "test": {}}
        if unit.seed != TUNING_SEED:
            result["test"] = {
                variant: {
                    "last": _kept(arena.evaluate(recorder.last[variant], "test")),
                    "best": _kept(arena.evaluate(recorder.best[variant], "test")),
                }
                for variant in recorder.curves
            }
        return result


def best_validation(result: Result) -> float:
    """The highest validation reward of the run, whichever of its variants has it."""
    return max(point["reward"] for curve in result["curves"].values() for point in curve)


def choose(scores: Mapping[Setting, float]) -> Setting:
    """The setting with the highest score."""
    return max(scores, key=lambda setting: scores[setting])


def better_variant(results: Sequence[Result]) -> str:
    """Which variant has the higher validation reward at its best, on average over the runs."""

    def score(variant: str) -> float:
        return sum(max(point["reward"] for point in result["curves"][variant]) for result in results)

    return max(results[0]["curves"], key=score)


def write_json(file: Path, content: Any) -> None:
    """A file that is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, ensure_ascii=False))


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _kept(evaluation: Evaluation) -> Result:
    scores = {name: [round(s, 5) for s in evaluation.per_response[name]] for name in KEPT_SCORES}
    return {"metrics": evaluation.metrics, "responses": evaluation.responses, "scores": scores}
