"""`lmdqn recipes ...`: list, show and copy what is shipped; the schema of recipe files."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lmdqn.cli.common import RecipeName
from lmdqn.errors import UserError

commands = typer.Typer(help="List, show and copy the recipes that come with lmdqn.", no_args_is_help=True)


@commands.command("list")
def list_all() -> None:
    """Every shipped recipe, a line each."""
    from lmdqn.shipped import describe, shipped_recipes

    for name, file in shipped_recipes().items():
        typer.echo(f"{name:32} {describe(file)}")


@commands.command("show")
def show(recipe: RecipeName) -> None:
    """Print a recipe as it stands in its file."""
    from lmdqn.shipped import find_recipe

    typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@commands.command("copy")
def copy(
    recipe: RecipeName, to: Annotated[Path, typer.Argument(help="The new file; an existing one is never replaced.")]
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from lmdqn.shipped import find_recipe

    text = find_recipe(recipe).read_text(encoding="utf-8")
    try:
        with to.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{to} is already there: choose another name") from error
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror}") from error


@commands.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors: completion, descriptions, checks."""
    from lmdqn.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
