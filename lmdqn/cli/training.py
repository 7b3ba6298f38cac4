"""Commands that run a recipe: train, quickstart, check."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmdqn.cli.common import Overrides, RecipeName, console, load, quiet_libraries
from lmdqn.errors import UserError

if TYPE_CHECKING:
    from lmdqn.pipeline import RunResult
    from lmdqn.recipe import Recipe

commands = typer.Typer()
PHASE_WORDS = {"mle": "MLE", "dqn": "DQN", "total": "in all"}


@commands.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    continued: Annotated[
        str | None,
        typer.Option("--continue", metavar="RUN", help="Learn on from this finished run, its replay kept."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in output.dir, as if never stopped.")
    ] = False,
) -> None:
    """Run a recipe: evaluate the start, warm-start if asked, learn by DQN, evaluate, save."""
    if continued is not None:  # of a run that was itself continued, the recipe names another
        overrides = [f"continued={{run: {json.dumps(continued)}}}", "warm_start=null", *(overrides or [])]
    resolved = load(recipe, overrides)
    quiet_libraries()
    from lmdqn import pipeline
    from lmdqn.learn.processes import part

    _show_run(pipeline.train(resolved, resume=resume), resolved, samples=0)
    part()


@commands.command()
def quickstart(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[summarisation|dialogue] [KEY=VALUE]...",
            help="Which shipped data set (summarisation unless said), and dotted overrides.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run's folder [default: runs/quickstart_TASK].")] = None,
) -> None:
    """Build a small model, warm-start it by MLE, fine-tune it by DQN, compare. Minutes on a CPU, no network."""
    from lmdqn.quickstart import quickstart_recipe

    words = words or []
    task = words.pop(0) if words and "=" not in words[0] else "summarisation"
    recipe = quickstart_recipe(task, output or Path("runs") / f"quickstart_{task}", words)
    quiet_libraries()
    from lmdqn import pipeline

    _show_run(pipeline.train(recipe), recipe, samples=3)


@commands.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Validate a recipe and print it resolved, with a memory estimate. Downloads and writes nothing."""
    resolved = load(recipe, overrides)
    from lmdqn.model.memory import estimate_memory
    from lmdqn.recipe import dump_recipe
    from lmdqn.results.run_folder import RunFolder
    from lmdqn.text.data import SPLITS, count_pairs
    from lmdqn.text.rewards import TaskRewards

    resolved.check_new()
    typer.echo(dump_recipe(resolved))
    RunFolder.check(resolved.output)
    if resolved.output.trackers:
        from lmdqn.results.trackers import check_installed

        check_installed(resolved.output.trackers)
    TaskRewards(resolved.every_task)
    for name, task in resolved.every_task.items():
        what = f"{name}: data" if name else "data"
        if task.data.hub is not None:
            typer.echo(f"{what}: {task.data.hub} is on the hub and was not looked at")
            continue
        sizes = [f"{count_pairs(task.data, split)} {split}" for split in SPLITS]
        typer.echo(f"{what}: {', '.join(sizes)}")
    if resolved.continued is not None:
        from lmdqn.learn.continuation import finished_run

        typer.echo(f"learning on from: {finished_run(resolved).path}")
    if resolved.offline is not None or resolved.continued is not None:
        from lmdqn.text.episode_log import read_logs

        for key, rows in read_logs(resolved).items():
            typer.echo(f"{key}: {len(rows)} episodes")
    try:
        typer.echo(f"memory: {estimate_memory(resolved)}")
    except UserError as error:
        if resolved.model.name is None or Path(resolved.model.name).exists():
            raise
        typer.echo(f"memory: not estimated, as the model's config is not here ({error})")


def _show_run(result: "RunResult", recipe: "Recipe", samples: int) -> None:
    if not result.is_main:
        return
    from lmdqn.results.report import kept_step
    from lmdqn.results.tables import p_value_line, result_tables, samples_table, show

    before = "mle" if "mle" in result.test else "start"
    examples = result.examples
    title = f"{len(examples)} test examples, greedy decoding"
    terminal = console()
    show(terminal, *result_tables(result.test, title), p_value_line(result.p_value, before))
    for task, p_value in result.task_p_values.items():
        show(terminal, f"{task}: {p_value_line(p_value, before)}")
    if samples:
        rows = [i * len(examples) // samples for i in range(samples)]
        show(terminal, samples_table(result.test, examples, rows))
    folder = result.folder
    kept = kept_step(folder.read_metrics(), recipe.evaluation.metric)
    took = ", ".join(f"{PHASE_WORDS[phase]} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    show(
        terminal,
        kept,
        took,
        f"model:       {folder.model}  (load it with transformers or peft)",
        f"report:      {folder.report}",
        f"results:     {folder.results}",
        f"predictions: {folder.predictions}",
        f"metrics:     {folder.metrics}",
        f"recipe:      {folder.recipe}",
    )
