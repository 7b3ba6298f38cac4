"""The command line put together, and how it ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Annotated

import typer

from lmdqn.cli import recipes, results, training, using
from lmdqn.errors import Stopped, UserError

app = typer.Typer(
    help="Fine-tune language models with token-level DQN.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmdqn {metadata.version('lmdqn')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What stands before a command."""


app.add_typer(training.commands)
app.add_typer(using.commands)
app.add_typer(results.commands)
app.add_typer(recipes.commands, name="recipes")


def main() -> None:
    """Run the command line; what the user can mend ends in one sentence and exit code 2, a signal in 130 or 143."""
    sys.path.append(os.getcwd())  # a reward of one's own may be named module:function
    with _told_in_one_sentence():
        app()


@contextmanager
def _told_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        typer.echo(f"lmdqn: {error}", err=True)
        sys.exit(2)
    except Stopped as stopped:
        typer.echo(f"lmdqn: {stopped}", err=True)
        sys.exit(128 + stopped.signal_number)
