"""Commands that use a trained model: evaluate, generate, chat, log, push."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lmdqn.cli.common import (
    ForModel,
    OfTask,
    Overrides,
    RunOrModel,
    console,
    load_for_model,
    progress,
    quiet_libraries,
)
from lmdqn.errors import UserError

commands = typer.Typer()


@commands.command()
def evaluate(
    run_or_model: RunOrModel,
    overrides: Overrides = None,
    recipe: ForModel = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which split.")] = "test",
    output: Annotated[Path | None, typer.Option(help="Also write metrics and responses to this JSON file.")] = None,
    task: OfTask = None,
) -> None:
    """Score a run's model, or any model, by every metric; it decodes as `decoding` says: greedily unless told."""
    resolved = load_for_model(run_or_model, recipe, overrides, task)
    quiet_libraries()
    from lmdqn import answering
    from lmdqn.results.tables import result_tables, show
    from lmdqn.whole_files import write_whole

    evaluation, examples = answering.evaluate(run_or_model, resolved, split)
    name = Path(run_or_model).name
    show(console(), *result_tables({name: evaluation}, f"{len(examples)} {split} examples"))
    if output is not None:
        result: dict[str, Any] = {"metrics": evaluation.metrics, "responses": evaluation.responses}
        if evaluation.tasks:
            result["tasks"] = {name: of_task.metrics for name, of_task in evaluation.tasks.items()}
        write_whole(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


@commands.command()
def generate(
    run_or_model: RunOrModel,
    overrides: Overrides = None,
    source: Annotated[list[str] | None, typer.Option(help="A source text; may be given several times.")] = None,
    input: Annotated[
        Path | None, typer.Option(help="A file with a source a line, or a .jsonl file; - is standard input.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the responses here: a line each, or objects in a .jsonl file.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    recipe: ForModel = None,
    task: OfTask = None,
) -> None:
    """Print or write a response for each source, decoded as `decoding` says."""
    resolved = load_for_model(run_or_model, recipe, overrides, task)
    quiet_libraries()
    from lmdqn import answering
    from lmdqn.recipe import DataSection
    from lmdqn.text.data import read_sources, source_alone, sources_in
    from lmdqn.whole_files import whole_file

    pairs = [source_alone(text) for text in source or []]
    if str(input) == "-":
        pairs += sources_in(sys.stdin.buffer.read(), "standard input")
    elif input is not None:
        pairs += read_sources(input, resolved.only_task.data if resolved is not None else DataSection())
    if not pairs:
        raise UserError("nothing to respond to: give --source TEXT or --input FILE")
    if output is not None and output.exists() and not overwrite:
        raise UserError(f"{output} is already there: --overwrite replaces it")
    with whole_file(output) if output is not None else nullcontext(sys.stdout) as lines:
        loaded, resolved = answering.load_for_use(run_or_model, resolved)
        responses = answering.responses(run_or_model, loaded, resolved, pairs)
        for pair, response in zip(pairs, progress(responses, len(pairs), shown=output is not None), strict=True):
            print(answering.answer_line(pair, response, output or Path("-")), file=lines, flush=output is None)


@commands.command()
def chat(run_or_model: RunOrModel, overrides: Overrides = None, recipe: ForModel = None, task: OfTask = None) -> None:
    """Talk to a run's model; its responses stream. /values shows each token's advantage, /reset forgets the turns."""
    resolved = load_for_model(run_or_model, recipe, overrides, task)
    quiet_libraries()
    from lmdqn.answering import load_for_use
    from lmdqn.chat import COMMANDS, Chat, converse

    loaded, resolved = load_for_use(run_or_model, resolved)
    if sys.stdin.isatty():
        typer.echo(COMMANDS, err=True)
    converse(Chat(loaded, resolved), run_or_model, _typed(), console(), console(stderr=True))


@commands.command()
def log(
    run_or_model: RunOrModel,
    output: Annotated[Path, typer.Option(help="The new file, JSONL; an existing one is never replaced.")],
    overrides: Overrides = None,
    recipe: ForModel = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Whose prompts.")] = "train",
    task: OfTask = None,
) -> None:
    """Sample responses as the recipe's rollouts would, score them and write them down, for offline learning."""
    resolved = load_for_model(run_or_model, recipe, overrides, task)
    if output.exists():  # before a model is loaded in vain
        raise UserError(f"{output} is already there: choose another name")
    quiet_libraries()
    from lmdqn.answering import log_episodes
    from lmdqn.text.episode_log import write_log

    count, sampled = log_episodes(run_or_model, resolved, split)
    count, mean = write_log(output, progress(sampled, count, shown=True))
    typer.echo(f"{output}: {count} episodes, mean reward {mean:.3f}")


@commands.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run's folder.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="The hub repository; made if it is new.")],
    private: Annotated[bool, typer.Option("--private", help="Make the new repository private.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into its base model first.")] = False,
    revision: Annotated[str, typer.Option(help="The branch; made if it is new.")] = "main",
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of files that are there already.")] = False,
) -> None:
    """Publish a run's model, tokenizer and model card on the Hugging Face hub, in one commit."""
    from lmdqn.results.publish import push as publish

    typer.echo(publish(run, repository, private, merge, revision, replace))


def _typed() -> Iterator[str]:
    """What a person types, with a prompt and line editing, or the lines of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # arrow keys in input()
    with suppress(EOFError):
        while True:
            yield input("> ")
