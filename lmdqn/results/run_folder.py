"""A run's folder: the contract that other tools read. Everything in it is written beside and swapped in."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmdqn.errors import UserError, writing
from lmdqn.recipe import OutputSection, Recipe, dump_recipe
from lmdqn.whole_files import beside, leaving, swap_in, write_whole

if TYPE_CHECKING:  # `check` needs paths alone, and these import torch, which takes seconds
    from lmdqn.episodes import Episode, Example
    from lmdqn.model.qnetwork import QNetwork
    from lmdqn.results.evaluate import Evaluation
    from lmdqn.results.significance import Significance


class RunFolder:
    """Paths of a run, and how its files are written."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.predictions = path / "predictions.jsonl"
        self.model = path / "model"  # the best on validation
        self.last = path / "last"  # the target network at the end
        self.batch = path / "skipped_batch.json"  # of the step that ended the run because it was not finite
        self.trackers = path / "trackers"  # files of experiment trackers
        self.checkpoints = path / "checkpoints"  # what a stopped run goes on from
        self.reference = path / "reference"  # the reference policy, where it is no pretrained model
        self.calibration = path / "calibration.parquet"
        self.report = path / "report.html"

    @classmethod
    def check(cls, output: OutputSection, resume: bool = False) -> "RunFolder":
        """The run's paths, nothing written yet. With `resume`, a run may be there.

        Raises:
            UserError: the folder holds something and `output.overwrite` is off, or is not a run that may go (or, with
                `resume`, go on).
        """
        path = Path(output.dir)
        if blocking := next((p for p in (path, *path.parents) if p.is_file()), None):
            raise UserError(f"output.dir {path} cannot be made: {blocking} is a file")
        run = cls(path)
        if resume:
            if not run.recipe.exists() and not run.is_barely_begun():
                raise UserError(f"{path} is no run of lmdqn that could be resumed: it has no recipe.yaml")
        elif path.is_dir() and any(path.iterdir()):
            if not output.overwrite:
                what = "a run" if run.recipe.exists() else "something"
                raise UserError(f"{path} already holds {what}: choose another output.dir, or set output.overwrite=true")
            run._refuse_strangers()
            if not run.recipe.exists():
                raise UserError(f"{path} is not empty and no run of lmdqn: output.overwrite does not delete it")
        return run

    def _refuse_strangers(self) -> None:
        """Raise UserError where the folder holds what no run wrote, which nothing may delete."""
        if strangers := sorted(file.name for file in self.path.iterdir() if not self._is_ours(file)):
            raise UserError(
                f"{self.path} holds {strangers[0]}, which no run wrote: move it, or choose another output.dir"
            )

    def _is_ours(self, file: Path) -> bool:
        ours = [path for path in vars(self).values() if path != self.path]
        return file in (*ours, *map(beside, ours), *map(leaving, ours))

    def is_barely_begun(self) -> bool:
        """Nothing is there but what a run leaves that was killed before its first checkpoint was complete."""
        if self.recipe.exists():  # a run of ours: its model is saved after its first checkpoint
            return not self.model.exists() and not self.results.exists()
        return not self.path.is_dir() or all(file.name == beside(self.recipe).name for file in self.path.iterdir())

    def reference_name(self, recipe: Recipe) -> str:
        """Where pi_0 is: in the run, or the pretrained model where Q-learning began from that itself.

        Raises:
            UserError: it is not there.
        """
        if self.reference.is_dir():
            return str(self.reference)
        if recipe.model.name is None or recipe.warm_start is not None:
            raise UserError(f"{self.reference} is missing: the policy that Q-learning began from is not there")
        return recipe.model.name

    def begin(self, recipe: Recipe) -> None:
        """Create the folder (emptied of an old run that `check` allowed to go) with the resolved recipe.

        Raises:
            UserError: it cannot be made, or holds what no run wrote.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._refuse_strangers()
            for file in self.path.iterdir():
                shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        write_whole(self.recipe, dump_recipe(recipe))

    def go_on(self, recipe: Recipe) -> None:
        """Note the recipe, whose budget may be another; what an end told of a model that may not stay is dropped."""
        for file in (self.results, self.predictions, self.report):
            file.unlink(missing_ok=True)
        write_whole(self.recipe, dump_recipe(recipe))

    def save_model(self, network: "QNetwork", tokenizer: Any, folder: Path) -> None:
        """Save what ordinary transformers or peft loads, with the value head in a file of its own beside it.

        Where processes share the weights out, the network must be whole.
        """
        from safetensors.torch import save_file

        from lmdqn.model.sharding import state_dict

        def fill(fresh: Path) -> None:
            with network.active() as model:
                if network.adapter is None:
                    model.save_pretrained(fresh, state_dict=None if network.shards is None else state_dict(model))
                else:
                    model.save_pretrained(fresh, selected_adapters=[network.adapter])
                    model.generation_config.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            head = {name: p.detach().cpu().contiguous() for name, p in network.value_head.tensors().items()}
            save_file(head, fresh / "value_head.safetensors")

        with writing(folder):
            swap_in(folder, fill)

    def save_batch(self, episodes: Sequence["Episode"]) -> None:
        """Write episodes as they entered a step, for inspection."""
        from torch import Tensor

        kept = [
            {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(episode).items()}
            | {"example": vars(episode.example)}
            for episode in episodes
        ]
        write_whole(self.batch, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")

    def save_results(
        self,
        test: Mapping[str, "Evaluation"],
        significance: "Significance",
        seconds: Mapping[str, float],
        examples: Sequence["Example"],
    ) -> None:
        """Write `results.json`, and `predictions.jsonl` with one line for each test example."""
        from lmdqn.results.environment import environment, peak_memory_mib

        results = {
            **_tables(test, significance),
            "seconds": _rounded(seconds),
            "peak_memory_mib": peak_memory_mib(),
            "environment": environment(),
        }
        by_task = {task: _of_task(test, task) for task in significance.tasks}
        if by_task:
            results["tasks"] = {task: _tables(own, significance.tasks[task]) for task, own in by_task.items()}
        write_whole(self.results, json.dumps(results, indent=2) + "\n")
        lines = [
            line
            for task, own in (by_task or {"": dict(test)}).items()
            for line in _lines(own, [example for example in examples if example.task == task])
        ]
        write_whole(self.predictions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def read_results(self, task: str = "") -> dict[str, Any]:
        """`results.json`; of a named task, with that one's tables in the place of the whole run's.

        Raises:
            UserError: this is no run, or one that has not ended.
        """
        if not self.recipe.exists():
            raise UserError(f"{self.path} is no run of lmdqn: it has no recipe.yaml")
        if not self.results.exists():
            raise UserError(f"run {self.path} has no results.json: it has not ended")
        results = _parsed(_read(self.results), str(self.results))
        return {**results, **results["tasks"][task]} if task else results

    def read_predictions(self, task: str = "") -> list[dict[str, Any]]:
        """`predictions.jsonl`, a dict a line; of a named task, that one's lines; raises as `read_metrics`."""
        lines = _read_lines(self.predictions)
        return [line for line in lines if line["task"] == task] if task else lines

    def read_evaluation(self, phase: str, task: str = "") -> "Evaluation":
        """What one phase of a run that has ended answered to the test split (of a task), and its scores."""
        from lmdqn.results.evaluate import Evaluation

        lines = self.read_predictions(task)
        scores = [line["scores"][phase] for line in lines]
        names = [name for name in scores[0] if all(name in of_line for of_line in scores)]
        per_response = {name: [of_line[name] for of_line in scores] for name in names}
        return Evaluation([line[phase] for line in lines], self.read_results(task)["test"][phase], per_response)

    def read_metrics(self) -> list[dict[str, Any]]:
        """`metrics.jsonl`, a dict a line.

        Raises:
            UserError: it is missing, or a line is cut.
        """
        return _read_lines(self.metrics)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = enumerate(_read(file).split("\n"), start=1)
    return [_parsed(line, f"{file}, line {number}") for number, line in lines if line]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: the run's file is damaged") from error


def _of_task(test: Mapping[str, "Evaluation"], task: str) -> dict[str, "Evaluation"]:
    return {phase: evaluation.tasks[task] for phase, evaluation in test.items()}


def _tables(test: Mapping[str, "Evaluation"], significance: "Significance") -> dict[str, Any]:
    return {
        "test": {name: _rounded(evaluation.metrics) for name, evaluation in test.items()},
        "interval": {
            name: {metric: [round(end, 4) for end in ends] for metric, ends in sorted(intervals.items())}
            for name, intervals in significance.interval.items()
        },
        "p_value": {  # six digits: that the least of all is below .001 must not be rounded away
            metric: float(f"{p:.6g}") for metric, p in sorted(significance.p_value["dqn"].items())
        },
    }


def _lines(test: Mapping[str, "Evaluation"], examples: Sequence["Example"]) -> list[dict[str, Any]]:
    return [
        {
            **({"task": example.task} if example.task else {}),
            "source": example.source,
            "references": list(example.references),
            **{name: evaluation.responses[i] for name, evaluation in test.items()},
            "scores": {
                name: _rounded({metric: scores[i] for metric, scores in evaluation.per_response.items()})
                for name, evaluation in test.items()
            },
        }
        for i, example in enumerate(examples)
    ]


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}
