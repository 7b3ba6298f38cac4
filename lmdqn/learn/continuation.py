"""What a finished run hands on to the run that learns on from it: its kept networks, its replay, its numbering.

The kept model is online and target network at once; the reference stays the finished run's own. Q is measured against
the reference, so only with that one do values, and log-probabilities kept in the replay, go on meaning what they did.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmdqn.episodes import Episode
from lmdqn.errors import UserError
from lmdqn.learn.checkpoint import BrokenCheckpointError, Checkpoints, State, read_state
from lmdqn.recipe import ModelSection, Recipe, differing_keys, load_recipe
from lmdqn.results.run_folder import RunFolder

SAME_Q = ("model.", "qlearning.form", "qlearning.beta", "qlearning.value_quantiles", "reward.")
REWARD_OF_TASK = re.compile(r"tasks\.(\w+)\.reward\.")


@dataclass
class Continuation:
    """The state of a finished run."""

    folder: RunFolder
    networks: dict[str, Any]  # of the step that validated best
    replay: State  # of the last step, as that of the collector
    collector: State
    reference_moved: bool  # the run reset its reference: what the replay knows of it may be of a later one
    episodes: list[list[Episode]] = field(default_factory=list)  # that join the replay, by prompt


def finished_run(recipe: Recipe) -> RunFolder:
    """The run that a recipe continues, found fit for it; its folder is only read.

    Raises:
        UserError: it is no run or has not ended, the new run would write into it, it has another model, Q or reward,
            or it has no checkpoint.
    """
    assert recipe.continued is not None
    folder = RunFolder(Path(recipe.continued.run))
    mine, its = Path(recipe.output.dir).resolve(), folder.path.resolve()
    if mine == its or mine in its.parents or its in mine.parents:
        raise UserError(f"output.dir {recipe.output.dir} is in or around the continued run {folder.path}: set another")
    folder.read_results()
    old = load_recipe(folder.recipe)
    if differing := [key for key in differing_keys(recipe, old) if _is_of_q(key, recipe, old)]:
        raise UserError(
            f"run {folder.path} cannot be continued with another model, Q or reward, for its values and the rewards "
            f"in its replay would mean something else: {', '.join(differing)} differ"
        )
    if not Checkpoints(folder.checkpoints, 1, ()).names():
        raise UserError(f"{folder.checkpoints} holds no checkpoint: run {folder.path} cannot be continued without one")
    return folder


def read_continuation(recipe: Recipe) -> Continuation:
    """What the finished run hands on.

    Raises:
        UserError: it is not fit for it (see `finished_run`), or a checkpoint is broken.
    """
    folder = finished_run(recipe)
    newest = Checkpoints(folder.checkpoints, 1, ()).names()[-1]
    try:
        last = read_state(folder.checkpoints / newest)
        best = last if last["best"] == newest else read_state(folder.checkpoints / last["best"])
    except BrokenCheckpointError as error:
        raise UserError(f"run {folder.path} cannot be continued: {error}") from error
    learner = last["learner"]
    moved = load_recipe(folder.recipe).qlearning.reference_reset_every is not None
    return Continuation(folder, best["learner"]["networks"], learner["replay"], learner["collector"], moved)


def kept_model(recipe: Recipe, folder: RunFolder) -> ModelSection:
    """Where the continued run's model and tokenizer are loaded from: an adapter's weights are its checkpoint's."""
    if recipe.model.lora is not None:
        return recipe.model
    return recipe.model.model_copy(update={"name": str(folder.model), "from_scratch": None})


def _is_of_q(key: str, recipe: Recipe, old: Recipe) -> bool:
    if task := REWARD_OF_TASK.match(key):
        return task.group(1) in (recipe.tasks or {}) and task.group(1) in (old.tasks or {})
    return key.startswith(SAME_Q)
