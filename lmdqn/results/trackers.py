"""TensorBoard, Weights & Biases, Trackio and the other trackers that Accelerate speaks to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration

from lmdqn.errors import UserError
from lmdqn.recipe import Recipe

PROJECT = "lmdqn"
TABLE = "validation samples"
COLUMNS = ("source", "reference", "response")
TAKE_TEXT = ("tensorboard", "trackio", "comet_ml")  # the others take numbers alone
Sample = tuple[str, str, str]  # by COLUMNS


def check_installed(trackers: Sequence[str]) -> None:
    """Accelerate would leave out a tracker that is not there without a word.

    Raises:
        UserError: a tracker's package is not installed.
    """
    available = {str(name) for name in get_available_trackers()}
    for name in trackers:
        if name not in available:
            raise UserError(f"output.trackers: {name} is not installed: pip install {name}")


def accelerator_for(recipe: Recipe) -> Accelerator:
    """Accelerate with the recipe's precision and trackers; those that keep files will use the run's `trackers/`."""
    project = ProjectConfiguration(logging_dir=str(Path(recipe.output.dir) / "trackers"))
    return Accelerator(
        mixed_precision=recipe.optimisation.mixed_precision,
        log_with=list(recipe.output.trackers) or None,
        project_config=project,
    )


class Trackers:
    """What a run tells its trackers; without any, every call does nothing."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe):
        """Write nothing yet."""
        self._accelerator = accelerator
        self._recipe = recipe
        self._step = 0
        self._phase, self._before_phase = "", 0
        self._samples: Sequence[Sample] = ()

    def start(self, metrics: Path, resume: bool) -> None:
        """Open the trackers with the resolved recipe, under the name of the run's folder.

        A resumed run's steps go on from those in its `metrics.jsonl`, in the tracker's own run where it lets one go on:
        TensorBoard by its folder, Weights & Biases by the run's id, Trackio by its name.
        """
        if metrics.exists():
            for line in metrics.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self._place(record["phase"], record["step"])
        if not self._recipe.output.trackers:
            return
        wandb_id = metrics.parent / "trackers" / "wandb_id"
        self._accelerator.init_trackers(
            PROJECT, _flat(self._recipe.model_dump(mode="json")), self._options(wandb_id, resume)
        )
        for tracker in self._accelerator.trackers if self._accelerator.is_main_process else ():
            if tracker.name == "wandb":
                wandb_id.parent.mkdir(exist_ok=True)
                wandb_id.write_text(tracker.tracker.id, encoding="utf-8")

    def _options(self, wandb_id: Path, resume: bool) -> dict[str, dict[str, str]]:
        """What each tracker's `init` is given: a name, and which run to go on with."""
        name = Path(self._recipe.output.dir).name
        options = {"wandb": {"name": name}, "trackio": {"name": name}}
        if resume:
            options["trackio"]["resume"] = "allow"
        if resume and wandb_id.exists():
            options["wandb"] |= {"id": wandb_id.read_text(encoding="utf-8"), "resume": "allow"}
        return options

    def log(self, phase: str, record: Mapping[str, Any]) -> None:
        """Log a record's numbers as phase/key, and samples that wait; steps go on from one phase to the next."""
        self._place(phase, record["step"])
        numbers = {f"{phase}/{key}": value for key, value in record.items() if isinstance(value, (int, float))}
        self._accelerator.log(numbers, step=self._step)
        if self._samples:
            self._log_samples()
        self._samples = ()

    def show(self, samples: Sequence[Sample]) -> None:
        """Log a few validation responses with the next record, whose step they belong to."""
        self._samples = samples[: self._recipe.output.tracked_samples]

    def finish(self) -> None:
        """Close the trackers. Processes stay together: another run may follow in them."""
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _place(self, phase: str, step: int) -> None:
        if phase != self._phase:
            self._phase, self._before_phase = phase, self._step
        self._step = self._before_phase + step

    def _log_samples(self) -> None:
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_table"):  # Weights & Biases, ClearML
                rows = [list(sample) for sample in self._samples]
                tracker.log_table(TABLE, columns=list(COLUMNS), data=rows, step=self._step)
            elif tracker.name in TAKE_TEXT:
                tracker.log({TABLE: _markdown(self._samples)}, step=self._step)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Dotted keys, as on the command line; what is unset is left out."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def _markdown(samples: Sequence[Sample]) -> str:
    """A table of one line a sample; text from models and data breaks neither lines nor cells."""
    rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in sample] for sample in samples]
    return "\n".join(f"| {' | '.join(row)} |" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows])
