"""The quick start: a small model, built, warm-started and fine-tuned on a data set that comes along."""

from pathlib import Path
from typing import Literal

from lmdqn.recipe import Recipe, load_recipe
from lmdqn.shipped import shipped_folder, shipped_recipes

Task = Literal["summarisation", "dialogue"]


def quickstart_recipe(task: Task, output: Path, overrides: list[str]) -> Recipe:
    """The shipped quick-start recipe of a task, on its shipped data, writing to `output`."""
    recipe = shipped_recipes()[f"quickstart_{task}"]
    data = shipped_folder("data") / task
    return load_recipe(recipe, [f"data.path={data}", f"output.dir={output}", *overrides])
