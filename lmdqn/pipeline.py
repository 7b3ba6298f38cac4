"""A whole run, from a recipe to its folder: `train` of the Python interface."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from lmdqn.answering import rollout_of
from lmdqn.episodes import Episode, Example
from lmdqn.errors import NotFinite, Stopped, UserError
from lmdqn.learn.checkpoint import AfterStep, BrokenCheckpointError, Checkpoints, State
from lmdqn.learn.processes import Processes
from lmdqn.learn.stopping import StopRequest, stop_requests
from lmdqn.learn.trainer import Trainer
from lmdqn.learn.warm_start import WarmStart
from lmdqn.model.loading import LoadedModel, load_model, load_trained
from lmdqn.model.qnetwork import Networks, QNetwork
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import DataSection, Recipe, differing_keys, load_recipe
from lmdqn.results.evaluate import Evaluation, score_responses
from lmdqn.results.report import write_report
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.significance import paired_significance
from lmdqn.results.trackers import Sample, Trackers, accelerator_for, check_installed
from lmdqn.results.tracking import Tracker
from lmdqn.text.data import SPLITS, Pair, load_pairs
from lmdqn.text.episode_log import EpisodeLog, read_log_rows
from lmdqn.text.prompts import encode_examples
from lmdqn.text.rewards import Reward

# What may change when a run goes on: where it is kept, and how long it goes.
FREE_KEYS = (
    "output.",
    "decoding.",
    "qlearning.max_",
    "warm_start.epochs",
    "warm_start.max_seconds",
    "evaluation.patience",
)


@dataclass
class RunResult:
    """What a finished run gives back to Python."""

    folder: RunFolder
    test: dict[str, Evaluation]  # by phase: start, mle where there was one, dqn
    p_value: dict[str, float]  # dqn against the phase before it, by metric
    seconds: dict[str, float]  # by phase
    examples: list[Example]  # the test split
    is_main: bool = True  # of several processes, the one that writes and speaks


def train(recipe: Recipe, tracker: Tracker | None = None, resume: bool = False) -> RunResult:
    """Run a recipe: evaluate the start, warm-start if asked, learn by DQN, evaluate, save.

    Nothing is written before recipe, data and model have been found sound. With `resume`, a stopped run goes on from
    its newest checkpoint as if it had never stopped.

    Raises:
        UserError: something in recipe, data or model that the user can mend.
        Stopped: SIGINT or SIGTERM ended the run; it can be resumed.
    """
    run = _prepare(recipe, tracker, resume)
    saved = run.begin(resume)
    run.trackers.start(run.folder.metrics, resume)
    run.tracker.tell(run.trackers)
    try:
        with stop_requests() as run.stop_request:
            _learn(run, saved)
        return _conclude(run)
    except NotFinite as problem:
        if not problem.episodes:  # of an evaluation
            raise
        raise run.keep_batch(problem) from problem
    finally:  # also where a signal or an error ends the run
        run.trackers.finish()


def _learn(run: "_Run", saved: State | None) -> None:
    """The phases, from the start or from what a checkpoint saved."""
    recipe, online, lessons = run.recipe, run.networks.online, run.examples["train"]
    if "start" not in run.results:
        run.results["start"] = run.test(online)
    if recipe.warm_start is not None and "mle" not in run.results:
        teacher = WarmStart(recipe, online, lessons, run.rollout.layout, run.accelerator, run.tracker)
        after_step = run.follow("mle", teacher, saved)
        run.seconds["mle"] = teacher.run(after_step)
        run.networks.settle()
        run.results["mle"] = run.test(online)
    if saved is None or saved["phase"] != "dqn":
        run.on_main(run.save_reference)
    trainer = Trainer(recipe, run.networks, run.rollout, lessons, run.reward, run.accelerator, run.tracker, run.log)
    after_step = run.follow("dqn", trainer, saved)
    run.seconds["dqn"] = trainer.run(run.validate, after_step, run.best_state)
    run.on_main(lambda: trainer.calibration.save(run.folder.calibration))


def _conclude(run: "_Run") -> RunResult:
    """Test what was kept against the phases before it, and write what the run leaves."""
    results, seconds, examples = run.results, run.seconds, run.examples["test"]
    run.on_main(lambda: run.folder.save_model(run.networks.target, run.tokenizer, run.folder.last))
    results["dqn"] = run.test_saved()
    before = "mle" if "mle" in results else "start"
    references = [example.references for example in examples]
    significance = paired_significance(results, before, references, run.recipe.evaluation.bootstrap_samples)
    seconds["total"] = run.elapsed_s
    run.on_main(lambda: run.folder.save_results(results, significance, seconds, examples))
    run.on_main(lambda: write_report(run.folder.path))
    return RunResult(run.folder, results, significance.p_value["dqn"], seconds, examples, run.processes.is_main)


@dataclass
class _Run:
    """What a run works with, found sound before anything is written."""

    recipe: Recipe
    folder: RunFolder
    reward: Reward
    accelerator: Accelerator
    tracker: Tracker
    trackers: Trackers
    tokenizer: Any
    rollout: Rollout
    networks: Networks
    examples: dict[str, list[Example]]  # by split
    log: Sequence[list[Episode]]  # of offline learning
    processes: Processes = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    stop_request: StopRequest = field(init=False, default_factory=StopRequest)
    results: dict[str, Evaluation] = field(init=False, default_factory=dict)  # of the test split, by phase
    seconds: dict[str, float] = field(init=False, default_factory=dict)  # by phase
    best: str | None = field(init=False, default=None)  # name of the checkpoint that validated best
    _began_s: float = field(init=False, default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.processes = Processes(self.accelerator)
        self.checkpoints = Checkpoints(
            self.folder.checkpoints, self.recipe.output.keep_checkpoints, self.examples["train"]
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
            self.on_main(lambda: self.folder.begin(self.recipe))
            self._write_metrics(0)
            return None
        saved = self.checkpoints.read(name)
        self.results = {phase: Evaluation(**evaluation) for phase, evaluation in saved["results"].items()}
        self.seconds, self.best = saved["seconds"], saved["best"]
        self._began_s -= saved["elapsed_s"]
        self._write_metrics(saved["metrics_bytes"])
        self.on_main(self._rewind_folder)
        self.tracker.say(f"going on from {self.checkpoints.folder / name}")
        return saved

    def _newest_checkpoint(self, resume: bool) -> str | None:
        newest = self.checkpoints.newest(self.tracker.say) if resume else None
        if newest is None and resume:
            if not self.folder.is_barely_begun():
                raise UserError(f"{self.folder.path} holds a run without a checkpoint: it cannot be resumed")
            self.tracker.say(f"{self.folder.path} holds no checkpoint: starting from the beginning")
        return newest

    def _write_metrics(self, after_bytes: int) -> None:
        if self.processes.is_main:
            self.tracker.write_to(self.folder.metrics, after_bytes)

    def _rewind_folder(self) -> None:
        """Note the recipe; `model/` may be of a later step than the checkpoint: make it the best one known there."""
        self.folder.go_on(self.recipe)
        if self.best is None:
            return
        try:
            best = self.checkpoints.read(self.best)
        except BrokenCheckpointError as error:
            self.tracker.say(f"{error}: {self.folder.model} stays as it is")
            return
        self.networks.target.restore(best["learner"]["networks"]["target"])
        self.folder.save_model(self.networks.target, self.tokenizer, self.folder.model)

    def save_reference(self) -> None:
        """Keep the policy that Q-learning begins from, of which the target is a copy now, unless it has a name."""
        if self.recipe.warm_start is not None or self.recipe.model.name is None:
            self.folder.save_model(self.networks.target, self.tokenizer, self.folder.reference)

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
        every = self.recipe.output.checkpoint_every_steps
        if better or last or number or (every is not None and step % every == 0):
            self.on_main(lambda: self.checkpoints.write(name, self._state(phase, learner), self.best))
        if better:  # after the checkpoint, from which a resumed run makes it again
            self.on_main(lambda: self.folder.save_model(self.networks.target, self.tokenizer, self.folder.model))
        if number:
            raise Stopped(
                f"stopped by {Signals(number).name} after {phase} step {step}; to go on: "
                f"lmdqn train {self.folder.recipe} --resume",
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
            "metrics_bytes": self.tracker.bytes_written,
            "recipe": self.recipe.model_dump(mode="json"),
        }

    def keep_batch(self, problem: NotFinite) -> UserError:
        """Write the episodes of a step that was not finite, for inspection; gives what to tell of it."""
        self.on_main(lambda: self.folder.save_batch(problem.episodes))
        most = self.recipe.optimisation.max_skipped
        return UserError(f"{problem}, more than {most} times in a row: its episodes are in {self.folder.batch}")

    def test(self, network: QNetwork) -> Evaluation:
        """Evaluate a network on the test split."""
        return self._evaluate(network, "test")

    def test_saved(self) -> Evaluation:
        """Evaluate, on the test split, what the folder holds: the proof that it loads and answers."""
        saved = load_trained(self.folder.model, self.recipe.model, self.recipe.data.max_response_tokens)
        with self.accelerator.autocast():
            return self._scored(saved.model.to(self.accelerator.device), "test")

    def validate(self) -> dict[str, float]:
        """Metrics of the target network on the validation split."""
        evaluation = self._evaluate(self.networks.target, "validation")
        self.trackers.show(_samples(self.examples["validation"], evaluation.responses))
        return evaluation.metrics

    def _evaluate(self, network: QNetwork, split: str) -> Evaluation:
        with network.active() as model, self.accelerator.autocast():
            return self._scored(model, split)

    def _scored(self, model: Any, split: str) -> Evaluation:
        """Each process answers its share; the main one scores the whole."""
        examples = self.examples[split]
        mine = self.processes.share(examples)
        responses = self.processes.gather(lambda: self.rollout.greedy(model, mine))
        return self.processes.on_main(lambda: score_responses(responses, examples, self.reward))


def _prepare(recipe: Recipe, tracker: Tracker | None, resume: bool) -> _Run:
    """Read and build everything, and write nothing. With several processes, none goes on before all have."""
    check_installed(recipe.output.trackers)
    processes = Processes(accelerator_for(recipe))
    tracker = tracker or (Tracker() if processes.is_main else Tracker(Console(quiet=True)))
    if processes.count > 1:
        tracker.say(f"learning in {processes.count} processes")
    prepared: list[_Run] = []
    processes.together(lambda: prepared.append(_prepare_alone(recipe, tracker, resume, processes)))
    return prepared[0]


def _prepare_alone(recipe: Recipe, tracker: Tracker, resume: bool, processes: Processes) -> _Run:
    folder = RunFolder.check(recipe.output, resume)
    if resume and folder.recipe.exists():
        _check_same(recipe, folder)
    for key, count in _shared(recipe):
        if count < processes.count:
            raise UserError(f"{key}={count} is too few for {processes.count} processes: each needs a share")
    reward = Reward(recipe.reward)
    accelerator = processes.accelerator
    pairs = {split: load_pairs(recipe.data, split, recipe.seed) for split in SPLITS}
    loaded = load_model(recipe.model, _texts(pairs["train"]), recipe.seed, recipe.data.max_response_tokens)
    loaded.model.to(accelerator.device)
    examples = _encode_all(pairs, recipe.data, loaded, tracker)
    networks = Networks.build(
        loaded,
        recipe.qlearning.beta,
        recipe.seed,
        recipe.optimisation.vocabulary_chunk_mib,
        recipe.qlearning.value_quantiles or 1,
        keep_first=recipe.qlearning.reference_reset_every is not None,
    )
    rollout = rollout_of(loaded, recipe)
    trackers = Trackers(accelerator, recipe)
    log = _read_log(recipe, loaded, examples["train"], tracker)
    tokenizer = loaded.tokenizer
    return _Run(recipe, folder, reward, accelerator, tracker, trackers, tokenizer, rollout, networks, examples, log)


def _shared(recipe: Recipe) -> list[tuple[str, int]]:
    """What processes share out."""
    shared = [("rollout.prompts", recipe.rollout.prompts), ("replay.batch_groups", recipe.replay.batch_groups)]
    if recipe.warm_start is not None:
        shared.append(("warm_start.batch_examples", recipe.warm_start.batch_examples))
    return shared


def _read_log(
    recipe: Recipe, loaded: LoadedModel, examples: Sequence[Example], tracker: Tracker
) -> Sequence[list[Episode]]:
    """The offline log's groups, in memory or on disk; none where the recipe has no log."""
    offline = recipe.offline
    if offline is None:
        return ()
    file, longest = Path(offline.path), recipe.data.max_response_tokens
    rows = read_log_rows(file, offline.in_memory)
    centre = recipe.qlearning.baseline
    log = EpisodeLog(str(file), rows, loaded.tokenizer, loaded.layout, examples, longest, centre)
    needed_by = "offline.boltzmann_js_nats" if offline.boltzmann_js_nats is not None else "qlearning.importance"
    if offline.boltzmann_js_nats is not None or recipe.qlearning.importance != "none":
        log.check_behaviour(needed_by, offline.behaviour)
    tracker.say(f"log: {len(rows)} episodes of {len(log)} prompts")
    return list(log) if offline.in_memory else log


def _check_same(recipe: Recipe, folder: RunFolder) -> None:
    differing = [key for key in differing_keys(recipe, load_recipe(folder.recipe)) if not key.startswith(FREE_KEYS)]
    if differing:
        raise UserError(
            f"the recipe is not that of the run in {folder.path}: {', '.join(differing)} differ; a resumed run may "
            "change its output and budget alone"
        )


def _samples(examples: Sequence[Example], responses: Sequence[str]) -> list[Sample]:
    return [(e.source, e.references[0] if e.references else "", r) for e, r in zip(examples, responses, strict=True)]


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.source, *pair.references)]


def _encode_all(
    pairs: dict[str, list[Pair]], data: DataSection, loaded: LoadedModel, tracker: Tracker
) -> dict[str, list[Example]]:
    examples: dict[str, list[Example]] = {}
    for split, of_split in pairs.items():
        examples[split], cuts = encode_examples(of_split, data, loaded.tokenizer, loaded.layout)
        if cuts:
            tracker.say(f"{split}: {cuts}")
    sizes = ", ".join(f"{len(examples[split])} {split}" for split in SPLITS)
    tracker.say(f"examples: {sizes}")
    return examples
