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
from lmdqn.model.qnetwork import Networks, QNetwork
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
    run = _prepare(recipe, tracker or Tracker())
    run.folder.begin(recipe)
    run.tracker.write_to(run.folder.metrics)
    online, lessons = run.networks.online, run.examples["train"]
    results, seconds = {"start": run.test(online)}, {}
    if recipe.warm_start is not None:
        seconds["mle"] = warm_start(recipe, online, lessons, run.rollout.layout, run.accelerator, run.tracker)
        run.networks.settle()
        results["mle"] = run.test(online)
    trainer = Trainer(recipe, run.networks, run.rollout, lessons, run.reward, run.accelerator, run.tracker)
    seconds["dqn"] = trainer.run(run.validate)
    run.folder.save_model(run.networks.target, run.tokenizer, run.folder.last)
    results["dqn"] = run.test_saved()
    examples = run.examples["test"]
    before = results.get("mle", results["start"])
    p_values = paired_p_values(results["dqn"], before, examples, recipe.evaluation.bootstrap_samples)
    seconds["total"] = time.perf_counter() - began
    run.folder.save_results(results, p_values, seconds, examples)
    return RunResult(run.folder, results, p_values, seconds, examples)


@dataclass
class _Run:
    """What a run works with, found sound before anything is written."""

    recipe: Recipe
    folder: RunFolder
    reward: Reward
    accelerator: Accelerator
    tracker: Tracker
    tokenizer: Any
    rollout: Rollout
    networks: Networks
    examples: dict[str, list[Example]]  # by split
    best_validation: float = float("-inf")

    def test(self, network: QNetwork) -> Evaluation:
        """Evaluate a network on the test split."""
        return self._evaluate(network, "test")

    def test_saved(self) -> Evaluation:
        """Evaluate, on the test split, what the folder holds: the proof that it loads and answers."""
        saved = load_trained(self.folder.model, self.recipe.model, self.recipe.data.max_response_tokens)
        with self.accelerator.autocast():
            model = saved.model.to(self.accelerator.device)
            return evaluate_model(model, self.rollout, self.examples["test"], self.reward)

    def validate(self) -> dict[str, float]:
        """Metrics of the target network on the validation split; the best so far is saved."""
        metrics = self._evaluate(self.networks.target, "validation").metrics
        if metrics[self.recipe.evaluation.metric] > self.best_validation:
            self.best_validation = metrics[self.recipe.evaluation.metric]
            self.folder.save_model(self.networks.target, self.tokenizer, self.folder.model)
        return metrics

    def _evaluate(self, network: QNetwork, split: str) -> Evaluation:
        with network.active() as model, self.accelerator.autocast():
            return evaluate_model(model, self.rollout, self.examples[split], self.reward)


def _prepare(recipe: Recipe, tracker: Tracker) -> _Run:
    """Read and build everything, and write nothing."""
    folder = RunFolder.check(recipe.output)
    reward = Reward(recipe.reward)
    accelerator = _accelerator(recipe)
    pairs = {split: load_pairs(recipe.data, split, recipe.seed) for split in SPLITS}
    loaded = load_model(recipe.model, _texts(pairs["train"]), recipe.seed, recipe.data.max_response_tokens)
    loaded.model.to(accelerator.device)
    examples = _encode_all(pairs, recipe.data, loaded, tracker)
    networks = Networks.build(loaded, recipe.qlearning.beta, recipe.seed)
    rollout = _rollout(loaded, recipe)
    return _Run(recipe, folder, reward, accelerator, tracker, loaded.tokenizer, rollout, networks, examples)


def evaluate(
    run_or_model: str | Path, recipe: Recipe | None = None, split: str = "test"
) -> tuple[Evaluation, list[Example]]:
    """Score a run's model, or any model by name or folder, on a split of the recipe's data (a run brings its own).

    Raises:
        UserError: no such run or model, or a bare model without a recipe that says on what to evaluate it.
    """
    loaded, recipe = _load_for_use(run_or_model, recipe)
    pairs = load_pairs(recipe.data, split, recipe.seed)
    examples, _ = encode_examples(pairs, recipe.data, loaded.tokenizer, loaded.layout)
    return evaluate_model(loaded.model, _rollout(loaded, recipe), examples, Reward(recipe.reward)), examples


def generate(run_or_model: str | Path, sources: Sequence[str], recipe: Recipe | None = None) -> list[str]:
    """Greedy responses to sources, prompted as the run's recipe (or the given one) prompts."""
    loaded, recipe = _load_for_use(run_or_model, recipe)
    pairs = [Pair(source, (), {"source": source}) for source in sources]
    examples, _ = encode_examples(pairs, recipe.data, loaded.tokenizer, loaded.layout)
    return _rollout(loaded, recipe).greedy(loaded.model, examples)


def _load_for_use(run_or_model: str | Path, recipe: Recipe | None) -> tuple[LoadedModel, Recipe]:
    """The model on its device, and the recipe that says how it is prompted: the given one, else the run's own."""
    run = RunFolder(Path(run_or_model))
    name = str(run_or_model)
    if run.recipe.exists():
        if not run.model.is_dir():
            raise UserError(f"run {run.path} has no model/ folder: it ended before its first validation")
        name, recipe = str(run.model), recipe or load_recipe(run.recipe)
    if recipe is None:
        raise UserError(f"{run_or_model} is no run of lmdqn: give a recipe that names the data for it")
    loaded = load_trained(name, recipe.model, recipe.data.max_response_tokens)
    loaded.model.to(_accelerator(recipe).device)
    return loaded, recipe


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
    sizes = ", ".join(f"{len(examples[split])} {split}" for split in SPLITS)
    tracker.say(f"examples: {sizes}")
    return examples
