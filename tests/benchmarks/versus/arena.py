"""What every method meets alike: the set, the warm-started checkpoint, the reward, the decoder and the clock."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from lmdqn.episodes import Example
from lmdqn.learn.budget import Budget
from lmdqn.learn.prompt_draw import ExampleWalk
from lmdqn.model.loading import LoadedModel, load_model
from lmdqn.model.networks import TARGET_ADAPTER
from lmdqn.model.rollout import Rollout
from lmdqn.pipeline import train
from lmdqn.recipe import Lora, ModelSection, Recipe, load_recipe
from lmdqn.results.evaluate import Evaluation, evaluate_model
from lmdqn.shipped import find_recipe
from lmdqn.text.data import SPLITS, Pair, load_pairs
from lmdqn.text.prompts import encode_examples
from lmdqn.text.rewards import Reward

NO_LIMIT = 10**9  # steps, where the clock decides
LENGTHS = {  # tokens that cut less than 1 in 50 training sources and references, at 1,500 BPE tokens
    "e2e_nlg": ("data.max_prompt_tokens=96", "data.max_response_tokens=80"),
    "sgd_response": ("data.max_prompt_tokens=288", "data.max_response_tokens=64", "data.cut=start"),
    "arxiv_math_titles": ("data.max_prompt_tokens=144", "data.max_response_tokens=48"),
    "tatoeba_es_en": ("data.max_prompt_tokens=40", "data.max_response_tokens=40"),
}


@dataclass(frozen=True)
class Settings:
    """What one benchmark folder was made with; results of other settings never mix with it."""

    data: Path
    output: Path
    seconds: float  # of learning, for every method, by the clock
    evaluations: int  # on validation, evenly over those seconds
    threads: int
    clock: str = "wall"  # or cpu: the seconds that the process itself computed
    overrides: tuple[str, ...] = ()  # key=value on the recipe, for warm start and every method
    lora: int | None = None  # rank of the adapter that every method trains, instead of all weights


@dataclass(frozen=True)
class Task:
    """A set and a kind of model."""

    set: str
    architecture: str  # causal or seq2seq

    def __str__(self) -> str:
        return f"{self.set}-{self.architecture}"

    def folder(self, settings: Settings) -> Path:
        return settings.output / str(self)

    def recipe(self, settings: Settings, *more: str) -> Recipe:
        """The shipped from-scratch recipe on this set, with the benchmark's overrides and `more` of them."""
        own = (f"data.path={json.dumps(str(settings.data / self.set))}", *LENGTHS.get(self.set, ()))
        return load_recipe(find_recipe(f"from_scratch_{self.architecture}"), (*own, *settings.overrides, *more))

    def test_pairs(self, settings: Settings) -> list[Pair]:
        recipe = self.recipe(settings)
        return load_pairs(recipe.only_task.data, "test", recipe.seed)


@dataclass
class Arena:
    """One task, made ready once and met by every method."""

    task: Task
    settings: Settings

    def recipe(self, *more: str) -> Recipe:
        return self.task.recipe(self.settings, *more)

    def fresh(self) -> LoadedModel:
        """The warm-started checkpoint as an ordinary transformers model, loaded anew from its folder.

        Where methods train an adapter it comes with a fresh one, which changes nothing yet.
        """
        recipe, rank = self.recipe(), self.settings.lora
        lora = None if rank is None else Lora(rank=rank, alpha=2 * rank)
        section = ModelSection(name=str(self._checkpoint), lora=lora)
        return load_model(section, (), 0, recipe.max_response_tokens)

    @cached_property
    def decoder(self) -> LoadedModel:
        """A model that methods lend their weights to, so that all are decoded by the same code."""
        return self.fresh()

    @cached_property
    def rollout(self) -> Rollout:
        recipe, loaded = self.recipe(), self.decoder
        max_tokens, at_once = recipe.max_response_tokens, recipe.evaluation.batch_examples
        return Rollout(loaded.layout, loaded.tokenizer, max_tokens, at_once)

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        """By split."""
        recipe, loaded = self.recipe(), self.decoder
        pairs = {split: load_pairs(recipe.only_task.data, split, recipe.seed) for split in SPLITS}
        return {
            s: encode_examples(p, recipe.only_task.data, loaded.tokenizer, loaded.layout)[0] for s, p in pairs.items()
        }

    @cached_property
    def reward(self) -> Reward:
        return Reward(self.recipe().only_task.reward)

    def evaluate(self, weights: Mapping[str, Tensor], split: str) -> Evaluation:
        """lmdqn's own greedy decoding and metrics, and the length ratio."""
        Variant(self.decoder.model).restore(weights)
        examples = self.examples[split]
        evaluation = evaluate_model(self.decoder.model, self.rollout, examples, self.reward)
        words, usual = words_and_usual(evaluation.responses, [e.references for e in examples])
        evaluation.metrics["length_ratio"] = 100 * sum(words) / sum(usual)
        return evaluation

    def prompts(self, seed: int) -> Iterator[list[Example]]:
        """An endless walk over training examples, as many a step as the recipe draws; lmdqn's own order."""
        recipe, train = self.recipe(), self.examples["train"]
        generator = torch.Generator().manual_seed(seed)
        walk = ExampleWalk(train, recipe.task_weights, recipe.rollout.prompt_draw, generator)
        while True:
            yield [train[i] for i in walk.next(recipe.rollout.prompts)]

    @cached_property
    def _checkpoint(self) -> Path:
        """The model of a finished run of lmdqn that warm-started and then took no step of Q-learning."""
        folder = self.task.folder(self.settings) / "warm_start"
        if not (folder / "results.json").exists():
            where = f"output.dir={json.dumps(str(folder))}"
            train(self.recipe(where, "qlearning.max_steps=0"), resume=True)
        return folder / "model"


@dataclass(frozen=True)
class Variant:
    """What of a model a method would ship: all weights of a plain one, one adapter of a model with adapters."""

    model: Any
    adapter: str | None = None  # of those by name; None: the one that peft saves

    def weights(self) -> dict[str, Tensor]:
        """A copy, by names that all methods share."""
        own = self.model.state_dict()
        if hasattr(self.model, "peft_config"):
            name = self.adapter or TARGET_ADAPTER
            own = get_peft_model_state_dict(self.model, own, adapter_name=name, save_embedding_layers=False)
        return {name: weight.detach().clone() for name, weight in own.items()}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take what `weights` of another gave."""
        if hasattr(self.model, "peft_config"):
            set_peft_model_state_dict(self.model, dict(weights), self.adapter or TARGET_ADAPTER)
        else:
            self.model.load_state_dict(weights)


class Recorder:
    """The validation curve of a run at fixed times of a clock that stands still meanwhile; last and best weights.

    A run may have several *variants* of its weights, such as the trained ones and their average.
    """

    def __init__(self, arena: Arena):
        settings = arena.settings
        self.arena = arena
        self.curves: dict[str, list[dict[str, float]]] = {}
        self.last: dict[str, dict[str, Tensor]] = {}
        self.best: dict[str, dict[str, Tensor]] = {}
        self._marks = [settings.seconds * k / settings.evaluations for k in range(1, settings.evaluations)]
        self.start()

    def start(self) -> None:
        """The clock starts (again) from zero."""
        self.budget = Budget(NO_LIMIT, self.arena.settings.seconds)

    @property
    def spent(self) -> bool:
        return self.budget.spent(0)

    def step(self, episodes: int, variants: Mapping[str, Variant]) -> None:
        """Tell after every step how many episodes were sampled so far; evaluates the variants when it is time."""
        if self._marks and self.budget.seconds >= self._marks[0]:
            now = self.budget.seconds
            self._marks = [mark for mark in self._marks if mark > now]
            self._evaluate(episodes, variants)

    def finish(self, episodes: int, variants: Mapping[str, Variant]) -> None:
        """The last point of the curves."""
        self._evaluate(episodes, variants)
        self.last = {name: variant.weights() for name, variant in variants.items()}

    def _evaluate(self, episodes: int, variants: Mapping[str, Variant]) -> None:
        seconds = self.budget.seconds
        with self.budget.paused():
            for name, variant in variants.items():
                weights = variant.weights()
                metrics = self.arena.evaluate(weights, "validation").metrics
                curve = self.curves.setdefault(name, [])
                if metrics["reward"] > max((point["reward"] for point in curve), default=-math.inf):
                    self.best[name] = weights
                curve.append({"seconds": seconds, "episodes": episodes, **metrics})


def words_and_usual(responses: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[int], list[float]]:
    """Of each example, words of the response and mean words of the references; the sums' ratio is the length ratio."""
    return [len(r.split()) for r in responses], [fmean(len(r.split()) for r in refs) for refs in references]
