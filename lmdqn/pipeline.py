"""A whole run, from a recipe to its folder; and the evaluation of a run or any model. The Python interface."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from lmdqn.episodes import Example
from lmdqn.errors import UserError
from lmdqn.learn.trainer import Trainer
from lmdqn.learn.warm_start import warm_start
from lmdqn.model.loading import LoadedModel, load_model, load_trained
from lmdqn.model.qnetwork import Networks
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import DataSection, Recipe, load_recipe
from lmdqn.results.evaluate import Evaluation, evaluate_model, paired_p_values
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.tracking import Tracker
from lmdqn.text.data import SPLITS, Pair, load_pairs
from lmdqn.text.prompts import encode_examples
from lmdqn.text.rewards import Reward


@dataclass
class RunResult:
    """What a finished run gives back to Python."""

    folder: RunFolder
    test: dict[str, Evaluation]  # by phase: start, mle where there was one, dqn
    p_value: dict[str, float]  # dqn against the phase before it, by metric
    seconds: dict[str, float]  # by phase
    examples: list[Example]  # the test split


def train(recipe: Recipe, tracker: Tracker | None = None) -> RunResult:
    """Run a recipe: evaluate the start, warm-start if asked, learn by DQN, evaluate, save.

    Nothing is written before recipe, data and model have been found sound.

    Raises:
        UserError: something in recipe, data or model that the user can mend.
    """
    began = time.perf_counter()
    folder = RunFolder.check(recipe.output)
    reward = Reward(recipe.reward)
    accelerator = _accelerator(recipe)
    pairs = {split: load_pairs(recipe.data, split, recipe.seed) for split in SPLITS}
    loaded = load_model(recipe.model, _texts(pairs["train"]), recipe.seed, recipe.data.max_response_tokens)
    loaded.model.to(accelerator.device)
    tracker = tracker or Tracker()
    examples = _encode_all(pairs, recipe.data, loaded, tracker)
    rollout = _rollout(loaded, recipe)
    networks = Networks.build(loaded, recipe.qlearning.beta, recipe.seed)
    folder.begin(recipe)
    tracker.write_to(folder.metrics)

    def test(network: str) -> Evaluation:
        with getattr(networks, network).active() as model, accelerator.autocast():
            return evaluate_model(model, rollout, examples["test"], reward)

    def validate(step: int) -> dict[str, float]:
        with networks.target.active() as model, accelerator.autocast():
            scores = evaluate_model(model, rollout, examples["validation"], reward).metrics
        if scores[recipe.evaluation.metric] > best["score"]:
            best["score"] = scores[recipe.evaluation.metric]
            folder.save_model(networks.target, loaded.tokenizer, folder.model)
        return scores

    best = {"score": float("-inf")}
    results, seconds = {"start": test("online")}, {}
    if recipe.warm_start is not None:
        seconds["mle"] = warm_start(recipe, networks.online, examples["train"], rollout.layout, accelerator, tracker)
        networks.settle()
        results["mle"] = test("online")
    trainer = Trainer(recipe, networks, rollout, examples["train"], reward, accelerator, tracker)
    seconds["dqn"] = trainer.run(validate)
    folder.save_model(networks.target, loaded.tokenizer, folder.last)
    results["dqn"] = evaluate_model(load_trained(folder.model).model, rollout, examples["test"], reward)
    before = results.get("mle", results["start"])
    p_values = paired_p_values(results["dqn"], before, examples["test"], recipe.evaluation.bootstrap_samples)
    seconds["total"] = time.perf_counter() - began
    folder.save_results(results, p_values, seconds, examples["test"])
    return RunResult(folder, results, p_values, seconds, examples["test"])


def evaluate(
    run_or_model: str | Path, recipe: Recipe | None = None, split: str = "test"
) -> tuple[Evaluation, list[Example]]:
    """Score a run's model, or any model by name or folder, on a split of the recipe's data (a run brings its own).

    Raises:
        UserError: no such run or model, or a bare model without a recipe that says on what to evaluate it.
    """
    folder, recipe = _model_and_recipe(run_or_model, recipe)
    loaded = load_trained(folder)
    pairs = load_pairs(recipe.data, split, recipe.seed)
    examples, _ = encode_examples(pairs, recipe.data, loaded.tokenizer, loaded.layout)
    loaded.model.to(_accelerator(recipe).device)
    return evaluate_model(loaded.model, _rollout(loaded, recipe), examples, Reward(recipe.reward)), examples


def generate(run_or_model: str | Path, sources: Sequence[str], recipe: Recipe | None = None) -> list[str]:
    """Greedy responses to sources, prompted as the run's recipe (or the given one) prompts."""
    folder, recipe = _model_and_recipe(run_or_model, recipe)
    loaded = load_trained(folder)
    pairs = [Pair(source, (), {"source": source}) for source in sources]
    examples, _ = encode_examples(pairs, recipe.data, loaded.tokenizer, loaded.layout)
    loaded.model.to(_accelerator(recipe).device)
    return _rollout(loaded, recipe).greedy(loaded.model, examples)


def _model_and_recipe(run_or_model: str | Path, recipe: Recipe | None) -> tuple[str, Recipe]:
    run = RunFolder(Path(run_or_model))
    if run.recipe.exists():
        if not run.model.is_dir():
            raise UserError(f"run {run.path} has no model/ folder: it has not finished its first validation")
        return str(run.model), recipe or load_recipe(run.recipe)
    if recipe is None:
        raise UserError(f"{run_or_model} is no run of lmdqn: give a recipe that names the data for it")
    return str(run_or_model), recipe


def _accelerator(recipe: Recipe) -> Accelerator:
    accelerator = Accelerator(mixed_precision=recipe.optimisation.mixed_precision)
    if accelerator.num_processes > 1:
        raise UserError("lmdqn learns in one process for now: start it without accelerate launch")
    return accelerator


def _rollout(loaded: LoadedModel, recipe: Recipe) -> Rollout:
    return Rollout(loaded.layout, loaded.tokenizer, recipe.data.max_response_tokens, recipe.evaluation.batch_examples)


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.source, *pair.references)]


def _encode_all(
    pairs: dict[str, list[Pair]], data: DataSection, loaded: LoadedModel, tracker: Tracker
) -> dict[str, list[Example]]:
    examples: dict[str, list[Example]] = {}
    for split, of_split in pairs.items():
        examples[split], cuts = encode_examples(of_split, data, loaded.tokenizer, loaded.layout)
        if cuts:
            tracker.say(f"{split}: {cuts}")
    sizes: Any = ", ".join(f"{len(examples[split])} {split}" for split in SPLITS)
    tracker.say(f"examples: {sizes}")
    return examples
