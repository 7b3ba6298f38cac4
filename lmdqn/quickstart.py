"""The quick start: a small model, built, warm-started and fine-tuned on a data set that comes along."""

from collections.abc import Sequence
from pathlib import Path

from lmdqn.errors import UserError
from lmdqn.recipe import Recipe, load_recipe, nearest
from lmdqn.shipped import shipped_folder, shipped_recipes

TASKS = ("summarisation", "dialogue")


def quickstart_recipe(task: str, output: Path, overrides: Sequence[str]) -> Recipe:
    """The shipped quick-start recipe of a task, on its shipped data, writing to `output`.

    Raises:
        UserError: there is no such task.
    """
    if task not in TASKS:
        raise UserError(f"there is no quick start {task!r}{nearest(task, TASKS)}")
    data = shipped_folder("data") / task
    recipe = shipped_recipes()[f"quickstart_{task}"]
    return load_recipe(recipe, [f"data.path={data}", f"output.dir={output}", *overrides])
