"""A trained model at work: its evaluation, and its responses to sources, in batches. Part of the Python interface."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from lmdqn.episodes import VALUE_FEATURES, Episode, Example
from lmdqn.errors import UserError
from lmdqn.model.decoding import respond
from lmdqn.model.exploration import exploration_at
from lmdqn.model.loading import LoadedModel, hidden_size, load_trained
from lmdqn.model.qnetwork import QNetwork, ValueHead, load_value_head
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import Recipe, load_recipe
from lmdqn.results.evaluate import Evaluation, score_tasks
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.trackers import accelerator_for
from lmdqn.text.data import Pair, load_pairs, source_alone
from lmdqn.text.prompts import encode_examples
from lmdqn.text.rewards import TaskRewards


def evaluate(
    run_or_model: str | Path, recipe: Recipe | None = None, split: str = "test"
) -> tuple[Evaluation, list[Example]]:
    """Score a run's model, or any model by name or folder, on a split of the recipe's data (a run brings its own).

    Of a recipe with several tasks, all of them: `recipe.for_task(name)` is one alone.

    Raises:
        UserError: no such run or model, or a bare model without a recipe that says on what to evaluate it.
    """
    loaded, recipe = load_for_use(run_or_model, recipe)
    examples = _encoded_split(loaded, recipe, split)
    texts = decoder(run_or_model, loaded, recipe)(examples, 0)
    return score_tasks(texts, examples, TaskRewards(recipe.every_task), recipe.task_weights), examples


def generate(run_or_model: str | Path, sources: Sequence[str], recipe: Recipe | None = None) -> list[str]:
    """Responses to sources, prompted as the run's recipe (or the given one) prompts."""
    loaded, recipe = load_for_use(run_or_model, recipe)
    return list(responses(run_or_model, loaded, recipe, [source_alone(source) for source in sources]))


def responses(run_or_model: str | Path, loaded: LoadedModel, recipe: Recipe, pairs: Sequence[Pair]) -> Iterator[str]:
    """The response to each pair's source in turn, decoded as the recipe says, a batch at a time when asked for."""
    at_once = recipe.evaluation.batch_examples
    decode = decoder(run_or_model, loaded, recipe)
    for start in range(0, len(pairs), at_once):
        batch = pairs[start : start + at_once]
        examples, _ = encode_examples(batch, recipe.only_task.data, loaded.tokenizer, loaded.layout)
        yield from decode(examples, start)


def decoder(
    run_or_model: str | Path, loaded: LoadedModel, recipe: Recipe
) -> Callable[[Sequence[Example], int], list[str]]:
    """What decodes as the recipe says; what a method needs beside the model comes from the run's folder, once.

    It is called with examples, and with the number of the first of them where others came before: each number has
    random numbers of its own.

    Raises:
        UserError: the recipe's value head cannot rank responses, or is not there.
    """
    decoding, qlearning = recipe.decoding, recipe.qlearning
    folder, hidden = RunFolder(Path(run_or_model)), hidden_size(loaded.model)
    if decoding.method == "best_of_n":
        if not qlearning.has_value_head or qlearning.loss == "path" or qlearning.value_sees_references:
            raise UserError(
                "decoding.method=best_of_n ranks by a value head that needs no references: train with "
                "qlearning.form=dueling, loss=td and value_sees_references=false"
            )
        head = load_value_head(folder.model, hidden)
    else:
        head = ValueHead(hidden, VALUE_FEATURES, qlearning.beta)
    accelerator = accelerator_for(recipe)
    network, rollout = QNetwork(loaded.model, head.to(accelerator.device)), rollout_of(loaded, recipe)

    @cache
    def reference() -> QNetwork:
        model = load_on_device(folder.reference_name(recipe), recipe).model
        return QNetwork(model, ValueHead(hidden, VALUE_FEATURES, qlearning.beta).to(accelerator.device))

    @cache
    def rewards() -> TaskRewards:
        return TaskRewards(recipe.every_task)

    def decode(examples: Sequence[Example], first: int) -> list[str]:
        groups = range(first, first + len(examples))
        with accelerator.autocast():
            return respond(network, rollout, examples, groups, recipe, reference, rewards)

    return decode


def log_episodes(
    run_or_model: str | Path, recipe: Recipe | None = None, split: str = "train"
) -> tuple[int, Iterator[Episode]]:
    """Sample and score responses as the recipe's rollouts would: how many, and each, made when it is asked for.

    Raises:
        UserError: no such run or model, or exploration that is bounded by a reference network.
    """
    loaded, recipe = load_for_use(run_or_model, recipe)
    exploration = exploration_at(recipe.rollout, 0)
    if exploration.needs_reference:
        raise UserError("rollout.reference_top_k and reference_top_p need a reference beside the model: drop them")
    examples = _encoded_split(loaded, recipe, split)
    network = QNetwork(loaded.model, ValueHead(hidden_size(loaded.model), VALUE_FEATURES, recipe.qlearning.beta))
    accelerator = accelerator_for(recipe)
    network.to(accelerator.device)
    rollout, rewards = rollout_of(loaded, recipe), TaskRewards(recipe.every_task)
    samples, seed, at_once = recipe.rollout.samples, recipe.seed, recipe.evaluation.batch_examples

    def made() -> Iterator[Episode]:
        for start in range(0, len(examples), at_once):
            part = examples[start : start + at_once]
            groups = range(start, start + len(part))
            with accelerator.autocast():
                episodes = rollout.sample(network, part, samples, exploration, seed, groups)
            rewards.score(episodes)
            yield from episodes

    return samples * len(examples), made()


def load_for_use(run_or_model: str | Path, recipe: Recipe | None) -> tuple[LoadedModel, Recipe]:
    """The model on its device, and the recipe that says how it is prompted: the given one, else the run's own.

    Raises:
        UserError: no such run or model, or a bare model without a recipe.
    """
    run = RunFolder(Path(run_or_model))
    name = str(run_or_model)
    if run.recipe.exists():
        if not run.model.is_dir():
            raise UserError(f"run {run.path} has no model/ folder: it ended before its first validation")
        name, recipe = str(run.model), recipe or load_recipe(run.recipe)
    if recipe is None:
        raise UserError(f"{run_or_model} is no run of lmdqn: give --recipe, one that names the data for it")
    return load_on_device(name, recipe), recipe


def load_on_device(name: str, recipe: Recipe) -> LoadedModel:
    """A trained model, by folder or name, where the recipe's work is done."""
    loaded = load_trained(name, recipe.model, recipe.max_response_tokens)
    loaded.model.to(accelerator_for(recipe).device)
    return loaded


def rollout_of(loaded: LoadedModel, recipe: Recipe) -> Rollout:
    """What decodes responses with a recipe's model."""
    limits = {name: task.data.max_response_tokens for name, task in recipe.every_task.items()}
    at_once = recipe.evaluation.batch_examples
    return Rollout(loaded.layout, loaded.tokenizer, recipe.max_response_tokens, at_once, limits)


def _encoded_split(loaded: LoadedModel, recipe: Recipe, split: str) -> list[Example]:
    examples = []
    for name, task in recipe.every_task.items():
        pairs = load_pairs(task.data, split, recipe.seed)
        examples += encode_examples(
            pairs, task.data, loaded.tokenizer, loaded.layout, name, recipe.max_response_tokens
        )[0]
    return examples


def answer_line(pair: Pair, response: str, file: Path) -> str:
    """A response as a line of the output file: an object with its source in .jsonl, else the text alone."""
    if file.suffix == ".jsonl":
        return json.dumps({"source": pair.source, "response": response}, ensure_ascii=False)
    return one_line(response)


def one_line(text: str) -> str:
    """A response on one line, whatever breaks it has."""
    return " ".join(text.splitlines())
