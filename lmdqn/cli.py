"""The command line: `lmdqn COMMAND --help` says what each command takes."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lmdqn.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from lmdqn.pipeline import RunResult
    from lmdqn.recipe import Recipe

app = typer.Typer(
    help="Fine-tune language models with token-level DQN.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="List, show and copy the recipes that come with lmdqn.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, as in qlearning.max_steps=200.")
]
RunOrModel = Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, a model folder or hub name.")]
ForModel = Annotated[
    str | None, typer.Option("--recipe", help="For a bare model: the recipe that names data and prompt.")
]


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Run a recipe: evaluate the start, warm-start if asked, learn by DQN, evaluate, save."""
    resolved = _load(recipe, overrides)
    pipeline = _pipeline()

    _show_run(pipeline.train(resolved), samples=0)


@app.command()
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
    _show_run(_pipeline().train(recipe), samples=3)


@app.command()
def evaluate(
    run_or_model: RunOrModel,
    overrides: Overrides = None,
    recipe: ForModel = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which split.")] = "test",
    output: Annotated[Path | None, typer.Option(help="Also write metrics and responses to this JSON file.")] = None,
) -> None:
    """Score a run's model, or any model, with greedy decoding and every metric."""
    resolved = _load_for_model(run_or_model, recipe, overrides)
    pipeline = _pipeline()
    from lmdqn.results.tables import results_table, show

    evaluation, examples = pipeline.evaluate(run_or_model, resolved, split)
    show(_console(), results_table({Path(run_or_model).name: evaluation}, f"{len(examples)} {split} examples"))
    if output is not None:
        result = {"metrics": evaluation.metrics, "responses": evaluation.responses}
        output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command()
def generate(
    run_or_model: RunOrModel,
    overrides: Overrides = None,
    source: Annotated[list[str] | None, typer.Option(help="A source text; may be given several times.")] = None,
    input: Annotated[Path | None, typer.Option(help="A file with a source a line; - is standard input.")] = None,
    recipe: ForModel = None,
) -> None:
    """Print a greedy response for each source, a line each."""
    resolved = _load_for_model(run_or_model, recipe, overrides)
    pipeline = _pipeline()

    sources = list(source or [])
    if input is not None:
        text = sys.stdin.read() if str(input) == "-" else _read(input)
        sources += [line for line in text.splitlines() if line.strip()]
    if not sources:
        raise UserError("nothing to respond to: give --source TEXT or --input FILE")
    for response in pipeline.generate(run_or_model, sources, resolved):
        typer.echo(" ".join(response.split("\n")))


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Validate a recipe and print it resolved, with a memory estimate. Downloads and writes nothing."""
    resolved = _load(recipe, overrides)
    from lmdqn.model.memory import estimate_memory
    from lmdqn.recipe import dump_recipe
    from lmdqn.results.run_folder import RunFolder
    from lmdqn.text.data import SPLITS, load_pairs
    from lmdqn.text.rewards import Reward

    typer.echo(dump_recipe(resolved))
    RunFolder.check(resolved.output)
    Reward(resolved.reward)
    if resolved.data.hub is not None:
        typer.echo(f"data: {resolved.data.hub} is on the hub and was not looked at")
    else:
        sizes = [f"{len(load_pairs(resolved.data, split, resolved.seed))} {split}" for split in SPLITS]
        typer.echo(f"data: {', '.join(sizes)}")
    try:
        typer.echo(f"memory: {estimate_memory(resolved)}")
    except UserError as error:
        if resolved.model.name is None or Path(resolved.model.name).exists():
            raise
        typer.echo(f"memory: not estimated, as the model's config is not here ({error})")


@recipes_app.command("list")
def recipes_list() -> None:
    """Every shipped recipe, a line each."""
    from lmdqn.shipped import describe, shipped_recipes

    for name, file in shipped_recipes().items():
        typer.echo(f"{name:32} {describe(file)}")


@recipes_app.command("show")
def recipes_show(recipe: RecipeName) -> None:
    """Print a recipe as it stands in its file."""
    from lmdqn.shipped import find_recipe

    typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@recipes_app.command("copy")
def recipes_copy(
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


def main() -> None:
    """Run the command line; what the user can mend ends in one sentence and exit code 2."""
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


def _pipeline() -> Any:
    """The heavy part, imported when it is needed; transformers' bars and warnings would bury our own lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from lmdqn import pipeline

    return pipeline


def _load(recipe: str, overrides: list[str] | None) -> "Recipe":
    from lmdqn.recipe import load_recipe
    from lmdqn.shipped import find_recipe

    return load_recipe(find_recipe(recipe), overrides or [])


def _load_for_model(run_or_model: str, recipe: str | None, overrides: list[str] | None) -> "Recipe | None":
    """The given recipe, else the run's own, with overrides; None for a bare model without a recipe."""
    own = Path(run_or_model) / "recipe.yaml"
    if recipe is None and not own.exists():
        return None
    return _load(recipe or str(own), overrides)


def _show_run(result: "RunResult", samples: int) -> None:
    from lmdqn.results.tables import p_value_line, results_table, samples_table, show

    before = "mle" if "mle" in result.test else "start"
    examples = result.examples
    title = f"{len(examples)} test examples, greedy decoding"
    console = _console()
    show(console, results_table(result.test, title), p_value_line(result.p_value, before))
    if samples:
        rows = [i * len(examples) // samples for i in range(samples)]
        show(console, samples_table(result.test, examples, rows))
    folder = result.folder
    took = ", ".join(f"{PHASE_WORDS[phase]} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    show(
        console,
        f"{took}",
        f"model:       {folder.model}  (load it with transformers or peft)",
        f"results:     {folder.results}",
        f"predictions: {folder.predictions}",
        f"metrics:     {folder.metrics}",
        f"recipe:      {folder.recipe}",
    )


PHASE_WORDS = {"mle": "MLE", "dqn": "DQN", "total": "in all"}


def _console() -> "Console":
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(width=width)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
