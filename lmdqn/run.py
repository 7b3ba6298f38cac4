"""A run under way: how far it is, what it keeps, and how it is evaluated; by all of its processes together."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from lmdqn.episodes import Example
from lmdqn.errors import NotFinite, Stopped, UserError, writing
from lmdqn.learn.checkpoint import AfterStep, BrokenCheckpointError, Checkpoints, State
from lmdqn.learn.processes import Processes
from lmdqn.learn.stopping import StopRequest
from lmdqn.learn.trainer import Trainer
from lmdqn.learn.warm_start import WarmStart
from lmdqn.model.loading import load_trained
from lmdqn.model.qnetwork import QNetwork
from lmdqn.model.sharding import gathered
from lmdqn.preparation import Parts
from lmdqn.results.evaluate import Evaluation, score_tasks
from lmdqn.results.trackers import Sample
from lmdqn.whole_files import swap_in


@dataclass
class Run:
    """What a run works with, how far it is, and what it keeps."""

    parts: Parts
    processes: Processes = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    stop_request: StopRequest = field(init=False, default_factory=StopRequest)
    results: dict[str, Evaluation] = field(init=False, default_factory=dict)  # of the test split, by phase
    seconds: dict[str, float] = field(init=False, default_factory=dict)  # by phase
    best: str | None = field(init=False, default=None)  # name of the checkpoint that validated best
    _began_s: float = field(init=False, default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.processes = Processes(self.parts.accelerator)
        self.checkpoints = Checkpoints(
            self.parts.folder.checkpoints, self.parts.recipe.output.keep_checkpoints, self.parts.examples["train"]
        )

    def on_main(self, work: Callable[[], object]) -> None:
        """Let the main process write, and wait for it."""
        self.processes.on_main(work)

    @property
    def elapsed_s(self) -> float:
        """Seconds of work on this run, those before it was stopped included."""
        return time.perf_counter() - self._began_s

    def begin(self, resume: bool) -> State | None:
        """Make the run's folder, or go on from its newest sound checkpoint: that one's state, None at a start.

        Raises:
            UserError: no checkpoint is sound, there is none but a model, or the data are others than they were.
        """
        name = self.processes.on_main(lambda: self._newest_checkpoint(resume))
        if name is None:
            self.on_main(lambda: self.parts.folder.begin(self.parts.recipe))
            self._write_metrics(0)
            return None
        saved = self.checkpoints.read(name)
        self.results = {phase: Evaluation.of(evaluation) for phase, evaluation in saved["results"].items()}
        self.seconds, self.best = saved["seconds"], saved["best"]
        self.on_main(lambda: self.checkpoints.tidy(name, self.best))
        self._began_s -= saved["elapsed_s"]
        self._write_metrics(saved["metrics_bytes"])
        self._rewind_folder()
        self.parts.tracker.say(f"going on from {self.checkpoints.folder / name}")
        return saved

    def _newest_checkpoint(self, resume: bool) -> str | None:
        newest = self.checkpoints.newest(self.parts.tracker.say) if resume else None
        if newest is None and resume:
            if not self.parts.folder.is_barely_begun():
                raise UserError(f"{self.parts.folder.path} holds a run without a checkpoint: it cannot be resumed")
            self.parts.tracker.say(f"{self.parts.folder.path} holds no checkpoint: starting from the beginning")
        return newest

    def _write_metrics(self, after_bytes: int) -> None:
        if self.processes.is_main:
            self.parts.tracker.write_to(self.parts.folder.metrics, after_bytes)

    def _rewind_folder(self) -> None:
        """Note the recipe; `model/` may be of a later step than the checkpoint: make it the best one known there."""
        self.on_main(lambda: self.parts.folder.go_on(self.parts.recipe))
        best = self.best
        if best is None:
            return
        problem = self.processes.on_main(lambda: self.checkpoints.problem(best))
        if problem is not None:
            self.parts.tracker.say(f"{problem}: {self.parts.folder.model} stays as it is")
            return
        self.parts.networks.target.restore(self.checkpoints.read(best)["learner"]["networks"]["target"])
        self.save_target(self.parts.folder.model)

    def save_target(self, folder: Path) -> None:
        """Save the target network, as it is now, as one of the run's models."""
        self._save(self.parts.networks.target, folder)

    def _save(self, network: QNetwork, folder: Path) -> None:
        with network.whole() as whole:
            self.on_main(lambda: self.parts.folder.save_model(whole, self.parts.tokenizer, folder))

    def save_reference(self) -> None:
        """Keep the policy that Q-learning begins from, unless it has a name.

        Of adapters the target's is saved, an equal one yet: peft looks for that one's name. A continued run goes on
        with the other's.
        """
        if self.parts.finished is not None:
            kept, mine = self.parts.finished.folder.reference, self.parts.folder.reference
            if kept.is_dir():
                self.on_main(lambda: _copy(kept, mine))
        elif self.parts.recipe.warm_start is not None or self.parts.recipe.model.name is None:
            networks = self.parts.networks
            reference = networks.reference if networks.target.adapter is None else networks.target
            self._save(reference, self.parts.folder.reference)

    def best_state(self) -> State:
        """The trainer's state when it validated best."""
        assert self.best is not None
        try:
            return self.checkpoints.read(self.best)["learner"]
        except BrokenCheckpointError as error:
            raise UserError(f"cannot go back to the best checkpoint: {error}") from error

    def follow(self, phase: str, learner: WarmStart | Trainer, saved: State | None) -> AfterStep:
        """Bring a phase to where the checkpoint left it, if that was in it; gives what is to be called each step."""
        if saved is not None and saved["phase"] == phase:
            learner.restore(saved["learner"])
        return partial(self._after_step, phase, learner)

    def _after_step(self, phase: str, learner: WarmStart | Trainer, step: int, last: bool, better: bool) -> None:
        """Keep the best model, write a checkpoint where one is due, and stop where that was asked for."""
        name = f"{phase}-{step:06d}"
        number = max(self.processes.together(lambda: self.stop_request.signal_number or 0))
        if better:
            self.best = name
        every = self.parts.recipe.output.checkpoint_every_steps
        if better or last or number or (every is not None and step % every == 0):
            state = gathered(self._state(phase, learner))
            self.on_main(lambda: self.checkpoints.write(name, state, self.best))
        if better:  # after the checkpoint, from which a resumed run makes it again
            self.save_target(self.parts.folder.model)
        if number:
            raise Stopped(
                f"stopped by {Signals(number).name} after {phase} step {step}; to go on: "
                f"lmdqn train {self.parts.folder.recipe} --resume",
                number,
            )

    def _state(self, phase: str, learner: WarmStart | Trainer) -> State:
        return {
            "phase": phase,
            "learner": learner.state(),
            "best": self.best,
            "results": {name: asdict(evaluation) for name, evaluation in self.results.items()},
            "seconds": self.seconds,
            "elapsed_s": self.elapsed_s,
            "metrics_bytes": self.parts.tracker.bytes_written,
            "recipe": self.parts.recipe.model_dump(mode="json"),
        }

    def keep_batch(self, problem: NotFinite) -> UserError:
        """Write the episodes of a step that was not finite, for inspection; gives what to tell of it."""
        self.on_main(lambda: self.parts.folder.save_batch(problem.episodes))
        most = self.parts.recipe.optimisation.max_skipped
        return UserError(f"{problem}, more than {most} times in a row: its episodes are in {self.parts.folder.batch}")

    def test(self, network: QNetwork) -> Evaluation:
        """Evaluate a network on the test split."""
        return self._evaluate(network, "test")

    def test_saved(self) -> Evaluation:
        """Evaluate, on the test split, what the folder holds: the proof that it loads and answers."""
        saved = load_trained(self.parts.folder.model, self.parts.recipe.model, self.parts.recipe.max_response_tokens)
        with self.parts.accelerator.autocast():
            return self._scored(saved.model.to(self.parts.accelerator.device), "test")

    def validate(self) -> dict[str, float]:
        """Metrics of the target network on the validation split; of several tasks their mean, and each one's own."""
        evaluation = self._evaluate(self.parts.networks.target, "validation")
        self.parts.trackers.show(_samples(self.parts.examples["validation"], evaluation.responses))
        return evaluation.metrics | {
            f"{task}_{metric}": value
            for task, of_task in evaluation.tasks.items()
            for metric, value in of_task.metrics.items()
        }

    def _evaluate(self, network: QNetwork, split: str) -> Evaluation:
        with network.whole() as whole, whole.active() as model, self.parts.accelerator.autocast():
            return self._scored(model, split)

    def _scored(self, model: Any, split: str) -> Evaluation:
        """Each process answers its share; the main one scores the whole."""
        examples, weights = self.parts.examples[split], self.parts.recipe.task_weights
        mine = self.processes.share(examples)
        responses = self.processes.gather(lambda: self.parts.rollout.greedy(model, mine))
        return self.processes.on_main(lambda: score_tasks(responses, examples, self.parts.rewards, weights))


def _samples(examples: Sequence[Example], responses: Sequence[str]) -> list[Sample]:
    """What trackers show the first of: several tasks take turns."""
    turns: Counter[str] = Counter()
    placed = []
    for example, response in zip(examples, responses, strict=True):
        reference = example.references[0] if example.references else ""
        placed.append((turns[example.task], (example.source, reference, response)))
        turns[example.task] += 1
    return [sample for _, sample in sorted(placed, key=lambda pair: pair[0])]


def _copy(folder: Path, to: Path) -> None:
    with writing(to):
        swap_in(to, lambda fresh: shutil.copytree(folder, fresh, dirs_exist_ok=True))
