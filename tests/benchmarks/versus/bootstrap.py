"""Resampling test examples: every metric of a table on the same draws, for intervals and paired tests."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from lmdqn.results.significance import BOOTSTRAP_SEED
from lmdqn.text import metrics
from versus.arena import words_and_usual

Scores = dict[str, np.ndarray]  # by metric: (1 + draws,) its value on the whole split, then on each draw
DRAWS = 1000


def draw_counts(examples: int, draws: int = DRAWS) -> np.ndarray:
    """(1 + draws, examples): how often each example stands in the whole split, and in each draw with replacement."""
    chance = np.full(examples, 1 / examples)
    drawn = np.random.default_rng(BOOTSTRAP_SEED).multinomial(examples, chance, size=draws)
    return np.vstack([np.ones((1, examples), dtype=drawn.dtype), drawn])


def resampled(tested: Mapping[str, Any], references: Sequence[Sequence[str]], counts: np.ndarray) -> Scores:
    """Every metric of one system's test responses (as a unit keeps them) on the draws, 0 to 100."""
    responses = tested["responses"]
    words, usual = (counts @ np.asarray(numbers) for numbers in words_and_usual(responses, references))
    means = {**tested["scores"], "repeated_4grams": metrics.repeated_4grams(responses)}
    streams = metrics.reference_streams(references)
    return {
        **{name: 100 * (counts @ np.asarray(scores)) / len(responses) for name, scores in means.items()},
        "bleu": _of_corpus(BLEU(), responses, streams, counts),
        "chrf": _of_corpus(CHRF(), responses, streams, counts),
        "distinct2": _distinct_2(responses, counts),
        "length_ratio": 100 * words / usual,
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % around the observed value. The draws are shifted onto it: a draw repeats texts, so its distinct-2 is low."""
    spread = values[1:] - values[1:].mean()
    low, high = np.quantile(spread, (0.025, 0.975))
    return float(values[0] + low), float(values[0] + high)


def paired_p(better: np.ndarray, baseline: np.ndarray) -> float:
    """Two-sided p of the difference, as lmdqn's own paired bootstrap has it (Koehn 2004)."""
    difference = better - baseline
    spread = difference[1:] - difference[1:].mean()
    return float((np.sum(np.abs(spread) >= abs(difference[0])) + 1) / len(difference))


def _of_corpus(
    metric: Any, responses: Sequence[str], streams: list[list[str | None]], counts: np.ndarray
) -> np.ndarray:
    """BLEU or chrF from each response's sufficient statistics, as sacrebleu's own significance tests resample them."""
    statistics = np.asarray(metric._extract_corpus_statistics(responses, streams))
    return np.array([metric._compute_score_from_stats(row.tolist()).score for row in counts @ statistics])


def _distinct_2(responses: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """Different word bigrams over all, times 100."""
    numbers: dict[tuple[str, str], int] = {}
    bigrams = []  # number of each bigram
    owners = []  # and the response it stands in
    for owner, response in enumerate(responses):
        words = response.lower().split()
        for pair in pairwise(words):
            bigrams.append(numbers.setdefault(pair, len(numbers)))
            owners.append(owner)
    which, owner_of = np.asarray(bigrams, dtype=np.int64), np.asarray(owners, dtype=np.int64)
    shares = []
    for row in counts:
        times = row[owner_of]
        different = np.count_nonzero(np.bincount(which[times > 0], minlength=1))
        shares.append(100 * different / max(1, times.sum()))
    return np.asarray(shares)
