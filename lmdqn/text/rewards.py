"""Rewards: a weighted mix of metrics and of functions that a user brings, scoring whole responses."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmdqn.errors import UserError
from lmdqn.recipe import RewardSection
from lmdqn.text import metrics

RewardFunction = Callable[..., Sequence[float]]


class Reward:
    """Scores responses by the recipe's mix; every term is kept beside the weighted sum.

    A user's term is a function `f(responses, references, sources) -> list of float`, called by keyword with a
    list of texts, a list of lists of texts and a list of texts; it gives one finite number for each response.
    """

    def __init__(self, recipe: RewardSection):
        self.recipe = recipe
        self._own = {name: _load_function(name) for name in recipe.mix if ":" in name}

    def terms(
        self, responses: Sequence[str], references: metrics.References, sources: Sequence[str]
    ) -> dict[str, list[float]]:
        """Each term of the mix, unweighted, for each response.

        Raises:
            UserError: a user's function gave another number of scores, or one that is not finite.
        """
        recipe = self.recipe
        rouges = [name for name in recipe.mix if name in metrics.ROUGE_TYPES]
        found = dict(metrics.rouge(responses, references, rouges)) if rouges else {}
        for name in recipe.mix:
            if name == "bleu":
                found[name] = metrics.sentence_bleu(responses, references, recipe.bleu_smoothing, recipe.lowercase)
            elif name == "chrf":
                found[name] = metrics.sentence_chrf(responses, references, recipe.lowercase)
            elif name == "length":
                found[name] = metrics.length_match(responses, references)
            elif name == "repetition":
                found[name] = metrics.repeated_4grams(responses)
            elif name in self._own:
                found[name] = _call_own(name, self._own[name], responses, references, sources)
        return found

    def mix(self, terms: dict[str, list[float]]) -> list[float]:
        """The weighted sum of the terms for each response."""
        columns = [[self.recipe.mix[name] * score for score in scores] for name, scores in terms.items()]
        return [sum(parts) for parts in zip(*columns, strict=True)]

    def __call__(self, responses: Sequence[str], references: metrics.References, sources: Sequence[str]) -> list[float]:
        """The reward of each response."""
        return self.mix(self.terms(responses, references, sources))


def _load_function(name: str) -> RewardFunction:
    """`package.module:function`, or `path/to/file.py:function`."""
    origin, _, attribute = name.rpartition(":")
    try:
        module = _load_file(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except (ImportError, SyntaxError, OSError, ValueError, TypeError) as error:
        raise UserError(f"reward.mix term {name!r}: cannot load {origin} ({error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward.mix term {name!r}: {origin} has no function {attribute!r}")
    return function


def _load_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    name = f"lmdqn_user_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _call_own(
    name: str,
    function: RewardFunction,
    responses: Sequence[str],
    references: metrics.References,
    sources: Sequence[str],
) -> list[float]:
    scores = function(responses=list(responses), references=[list(refs) for refs in references], sources=list(sources))
    try:
        scores = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"reward {name!r} must give a list of numbers, one for each response ({error})") from error
    if len(scores) != len(responses):
        raise UserError(f"reward {name!r} gave {len(scores)} scores for {len(responses)} responses")
    for response, score in zip(responses, scores, strict=True):
        if not math.isfinite(score):
            raise UserError(f"reward {name!r} gave {score} for the response {response[:80]!r}")
    return scores
