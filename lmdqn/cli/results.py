"""Commands that look at what runs left behind: report, compare, inspect."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from lmdqn.cli.common import OfTask, Overrides, console, load_for_model, quiet_libraries
from lmdqn.errors import UserError

commands = typer.Typer()
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run's folder.")]


@commands.command()
def report(
    run: Run,
    output: Annotated[Path | None, typer.Option(help="The page [default: RUN/report.html].")] = None,
) -> None:
    """Write a run's report again: one HTML page with results, curves, calibration and every response."""
    from lmdqn.results.report import write_report

    typer.echo(write_report(run, output))


@commands.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_A RUN_B...", help="Runs; the first is the baseline.")],
    metric: Annotated[
        str | None, typer.Option(help="The metric that decides [default: the first run's evaluation.metric].")
    ] = None,
    test: Annotated[
        Literal["bootstrap", "randomisation"], typer.Option(help="Paired bootstrap or approximate randomisation.")
    ] = "bootstrap",
    samples: Annotated[int, typer.Option(min=100, help="Resamples, or trials.")] = 1000,
    output: Annotated[Path | None, typer.Option(help="Also write an HTML page, with plots and responses.")] = None,
    task: OfTask = None,
) -> None:
    """Compare runs on the same test sources, with paired significance.

    The exit code is 0 where the last run is better than the first by the deciding metric with p < .05, 1 where it is
    not, and 2 where the runs cannot be compared.
    """
    from lmdqn.results.compare import compare_runs, comparison_table, write_comparison
    from lmdqn.results.tables import show

    comparison = compare_runs(runs, metric, test, samples, task)
    show(console(), comparison_table(comparison), *([comparison.note] if comparison.note else []))
    if output is not None:
        write_comparison(comparison, output)
        typer.echo(output)
    raise typer.Exit(0 if comparison.gained else 1)


@commands.command()
def inspect(
    run: Run,
    overrides: Overrides = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A source text, prompted as the run prompts; may be given several times.")
    ] = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="A reference for the one --prompt; may be given several times.")
    ] = None,
    data: Annotated[
        Literal["train", "validation", "test"] | None, typer.Option(help="Take sources from this split of the data.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --data: how many.")] = 5,
    top: Annotated[int, typer.Option(min=1, help="The likeliest tokens of either policy that are shown.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Write an HTML page instead.")] = None,
    task: OfTask = None,
) -> None:
    """Show what each token of a response was worth: its advantage, the value's course, and what else there was."""
    quiet_libraries()
    from lmdqn.results.inspection import inspect_run, pairs_to_inspect
    from lmdqn.results.inspection_view import caveat, full_colour, terminal_parts, write_inspection
    from lmdqn.results.tables import show

    recipe = load_for_model(run, None, overrides, task)
    if recipe is None:
        raise UserError(f"{run} is no run of lmdqn: it has no recipe.yaml")
    inspected = inspect_run(run, pairs_to_inspect(recipe, prompt or [], reference or [], data, limit), recipe, top)
    if output is not None:
        write_inspection(inspected, recipe, run, output)
        typer.echo(output)
        return
    for one in inspected:
        show(console(), *terminal_parts(one, full_colour(inspected)), "")
    if note := caveat(recipe, inspected):
        show(console(), note)
