"""A whole run, from a recipe to its folder: `train` of the Python interface."""

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
from lmdqn.learn.processes import Processes, others_alive
from lmdqn.learn.stopping import StopRequest, stop_requests
from lmdqn.learn.trainer import Trainer
from lmdqn.learn.warm_start import WarmStart
from lmdqn.model.loading import load_trained
from lmdqn.model.qnetwork import QNetwork
from lmdqn.model.sharding import gathered
from lmdqn.preparation import Parts, prepare
from lmdqn.recipe import Recipe
from lmdqn.results.evaluate import Evaluation, score_tasks
from lmdqn.results.report import write_report
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.significance import paired_significance
from lmdqn.results.trackers import Sample
from lmdqn.results.tracking import Tracker
from lmdqn.whole_files import swap_in


@dataclass
class RunResult:
    """What a finished run gives back to Python."""

    folder: RunFolder
    test: dict[str, Evaluation]  # by phase: start, mle where there was one, dqn
    p_value: dict[str, float]  # dqn against the phase before it, by metric
    seconds: dict[str, float]  # by phase
    examples: list[Example]  # the test split
    is_main: bool = True  # of several processes, the one that writes and speaks
    task_p_values: dict[str, dict[str, float]] = field(default_factory=dict)  # as p_value, of each of several tasks


@others_alive()
def train(recipe: Recipe, tracker: Tracker | None = None, resume: bool = False) -> RunResult:
    """Run a recipe: evaluate the start, warm-start if asked, learn by DQN, evaluate, save.

    Nothing is written before recipe, data and model have been found sound. With `resume`, a stopped run goes on from
    its newest checkpoint as if it had never stopped.

    Raises:
        UserError: something in recipe, data or model that the user can mend.
        Stopped: SIGINT or SIGTERM ended the run; it can be resumed.
    """
    parts = prepare(recipe, tracker, resume)
    run = _Run(parts)
    saved = run.begin(resume)
    parts.trackers.start(parts.folder.metrics, resume)
    parts.tracker.tell(parts.trackers)
    try:
        with stop_requests() as run.stop_request:
            _learn(run, saved)
        return _conclude(run)
    except NotFinite as problem:
        if not problem.episodes:  # of an evaluation
            raise
        raise run.keep_batch(problem) from problem
    finally:  # also where a signal or an error ends the run
        parts.trackers.finish()


def _learn(run: "_Run", saved: State | None) -> None:
    """The phases, from the start or from what a checkpoint saved."""
    parts = run.parts
    recipe, networks, lessons = parts.recipe, parts.networks, parts.examples["train"]
    if "start" not in run.results:
        run.results["start"] = run.test(networks.online)
    if recipe.warm_start is not None and "mle" not in run.results:
        teacher = WarmStart(recipe, networks.online, lessons, parts.rollout.layout, parts.accelerator, parts.tracker)
        after_step = run.follow("mle", teacher, saved)
        run.seconds["mle"] = teacher.run(after_step)
        networks.settle()
        run.results["mle"] = run.test(networks.online)
    trainer = Trainer(
        recipe, networks, parts.rollout, lessons, parts.rewards, parts.accelerator, parts.tracker, parts.log
    )
    if saved is None or saved["phase"] != "dqn":
        run.save_reference()
        if parts.finished is not None:
            trainer.go_on_from(parts.finished)
    after_step = run.follow("dqn", trainer, saved)
    run.seconds["dqn"] = trainer.run(run.validate, after_step, run.best_state)
    run.on_main(lambda: trainer.calibration.save(parts.folder.calibration))


def _conclude(run: "_Run") -> RunResult:
    """Test what was kept against the phases before it, and write what the run leaves."""
    parts, results, seconds = run.parts, run.results, run.seconds
    folder, examples = parts.folder, parts.examples["test"]
    run.save_target(folder.last)
    results["dqn"] = run.test_saved()
    before = "mle" if "mle" in results else "start"
    references = [example.references for example in examples]
    resamples, weights = parts.recipe.evaluation.bootstrap_samples, parts.recipe.task_weights
    significance = paired_significance(results, before, references, resamples, weights=weights)
    seconds["total"] = run.elapsed_s
    run.on_main(lambda: folder.save_results(results, significance, seconds, examples))
    run.on_main(lambda: write_report(folder.path))
    p_value, is_main = significance.p_value["dqn"], run.processes.is_main
    of_tasks = {task: of_task.p_value["dqn"] for task, of_task in significance.tasks.items()}
    return RunResult(folder, results, p_value, seconds, examples, is_main, of_tasks)


@dataclass
class _Run:
    """A run under way: how far it is, and what it keeps."""

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
