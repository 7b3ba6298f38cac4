"""A whole run, from a recipe to its folder: `train` of the Python interface."""

from dataclasses import dataclass, field

from lmdqn.episodes import Example
from lmdqn.errors import NotFinite
from lmdqn.learn.checkpoint import State
from lmdqn.learn.processes import others_alive
from lmdqn.learn.stopping import stop_requests
from lmdqn.learn.trainer import Trainer
from lmdqn.learn.warm_start import WarmStart
from lmdqn.preparation import prepare
from lmdqn.recipe import Recipe
from lmdqn.results.evaluate import Evaluation
from lmdqn.results.report import write_report
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.significance import paired_significance
from lmdqn.results.tracking import Tracker
from lmdqn.run import Run


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
    run = Run(parts)
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


def _learn(run: Run, saved: State | None) -> None:
    """The phases, from the start or from what a checkpoint saved."""
    parts = run.parts
    recipe, networks, lessons = parts.recipe, parts.networks, parts.examples["train"]
    if "start" not in run.results:
        run.results["start"] = run.test(networks.online)
    if recipe.warm_start is not None and "mle" not in run.results:
        _warm_start(run, saved)
        parts.accelerator.free_memory()  # MLE's moments; and fp16 unscales for every optimiser that Accelerate knows
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


def _warm_start(run: Run, saved: State | None) -> None:
    """The MLE phase, after which all networks are what it taught."""
    parts, networks = run.parts, run.parts.networks
    teacher = WarmStart(
        parts.recipe,
        networks.online,
        parts.examples["train"],
        parts.rollout.layout,
        parts.accelerator,
        parts.tracker,
    )
    run.seconds["mle"] = teacher.run(run.follow("mle", teacher, saved))
    networks.settle()


def _conclude(run: Run) -> RunResult:
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
