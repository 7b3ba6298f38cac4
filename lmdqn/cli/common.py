"""What the commands share: arguments, recipes by name, the terminal."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lmdqn.recipe import Recipe

T = TypeVar("T")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, as in qlearning.max_steps=200.")
]
RunOrModel = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, a model folder or hub name.")]
ForModel = Annotated[
    str | None, typer.Option("--recipe", help="For a bare model: the recipe that names data and prompt.")
]


OfTask = Annotated[str | None, typer.Option("--task", help="Of a recipe with several tasks, this one alone.")]


def load(recipe: str, overrides: list[str] | None) -> "Recipe":
    """A recipe by file or shipped name, overridden and validated."""
    from lmdqn.recipe import load_recipe
    from lmdqn.shipped import find_recipe

    return load_recipe(find_recipe(recipe), overrides or [])


def load_for_model(
    run_or_model: str, recipe: str | None, overrides: list[str] | None, task: str | None = None
) -> "Recipe | None":
    """The given recipe, else the run's own, with overrides, of one task alone where it is named.

    None for a bare model without a recipe.
    """
    own = Path(run_or_model) / "recipe.yaml"
    if recipe is None and not own.exists():
        return None
    loaded = load(recipe or str(own), overrides)
    return loaded if task is None else loaded.for_task(task)


def quiet_libraries() -> None:
    """transformers' bars and warnings, and the hub client's retries, would bury our lines."""
    import huggingface_hub
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def console(stderr: bool = False) -> "Console":
    """Standard output (or error); in a pipe, wide enough for a table."""
    from rich.console import Console

    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 160
    return Console(width=width, stderr=stderr)


def progress(items: Iterable[T], total: int, shown: bool) -> Iterable[T]:
    """The items, with a bar on standard error while they are taken; none in a pipe."""
    from rich.progress import track

    terminal = console(stderr=True)
    return track(items, "responses", total, console=terminal, disable=not (shown and terminal.is_terminal))
