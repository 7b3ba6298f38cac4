"""How each prefix of a response matches the references: what the value head is shown while training.

The reward compares the whole response with the references, so most of what can be known of it in mid-response is
how well the prefix matches them. A critic that sees this (an asymmetric critic, Pinto et al. 2017) explains far more
of the return than one that must guess the references from the source; the policy never sees it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmdqn.episodes import MATCH_FEATURES, VALUE_FEATURES, Batch, Episode

LONGEST_NGRAM = 4
KEPT_REFERENCES = 4096  # sets of references whose n-grams are kept


def measure_matches(episodes: Sequence[Episode]) -> None:
    """Write each episode's `match_features`, one row for every prefix of its response, from empty to whole.

    For a prefix of t tokens and references of m_r tokens with longest common subsequences c_r, the row holds: the
    best of c_r / m_r, of c_r / t and of 2 c_r / (t + m_r); for n = 1 .. 4 the share of the prefix's n-grams found
    in the references (clipped as in BLEU; 1 where it has none); the length of the matching n-gram that ends the
    prefix, over 4; and t over the references' mean length. Episodes without references keep None.
    """
    with_references = [e for e in episodes if e.example.reference_ids]
    if not with_references:
        return
    for episode in with_references:
        episode.match_features = _features(episode.response_ids, episode.example.reference_ids)
        assert episode.match_features.shape[1] == MATCH_FEATURES


def value_moments(batches: Sequence[Batch]) -> Tensor:
    """What the value head is shown in these states, and the return of their episodes, which it learns.

    Of each, how many states know it, its sum and its squares' sum: (3, VALUE_FEATURES + 1) float64 on the CPU; those of
    several processes add up.
    """
    if not batches:
        return torch.zeros(3, VALUE_FEATURES + 1, dtype=torch.float64)
    shown = torch.cat([batch.value_features[batch.state_mask] for batch in batches])  # (N, F)
    returns = torch.cat([batch.rewards.sum(1).repeat_interleave(batch.state_mask.sum(1)) for batch in batches])  # (N,)
    seen = torch.cat([shown, returns[:, None]], dim=1).double()
    known = seen.isfinite()
    seen = seen.where(known, 0.0)
    return torch.stack([known.sum(0), seen.sum(0), (seen**2).sum(0)]).cpu()


def mean_and_deviation(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Each column's mean and standard deviation, (C,) float32, from `value_moments` (3, C)."""
    count, total, squares = moments
    mean = total / count.clamp(min=1)
    variance = squares / count.clamp(min=1) - mean**2
    return mean.float(), variance.clamp(min=0).sqrt().float()


def _features(response: Sequence[int], references: tuple[tuple[int, ...], ...]) -> Tensor:
    """(n + 1, MATCH_FEATURES) of one response."""
    n = len(response)
    t = np.arange(n + 1.0)[:, None]  # (n + 1, 1) tokens of each prefix
    lengths = np.array([[len(ids) for ids in references]], np.float64)  # (1, R)
    common = subsequence_lengths(response, references)  # (n + 1, R)
    matched = np.zeros((n + 1, LONGEST_NGRAM))
    most = _most_in_a_reference(references)
    for order in range(1, min(LONGEST_NGRAM, n) + 1):
        matched[order:, order - 1] = _matches(response, order, most)
    counts = t - np.arange(LONGEST_NGRAM)  # (n + 1, 4) n-grams of each prefix
    precision = np.where(counts > 0, matched.cumsum(0) / counts.clip(min=1), 1.0)
    ending = (matched * np.arange(1, LONGEST_NGRAM + 1)).max(1, keepdims=True) / LONGEST_NGRAM
    columns = [
        (common / lengths).max(1, keepdims=True),
        (common / t.clip(min=1)).max(1, keepdims=True),
        (2 * common / (t + lengths)).max(1, keepdims=True),
        precision,
        ending,
        t / lengths.mean(),
    ]
    return torch.from_numpy(np.concatenate(columns, axis=1).astype(np.float32))


def subsequence_lengths(response: Sequence[int], references: tuple[tuple[int, ...], ...]) -> NDArray[np.float64]:
    """(n + 1, R) for each prefix of the response, from empty to whole: its longest common subsequences.

    A bit a token of all references, one after the other with an empty bit between, and an addition a token of the
    response (Hyyrö 2004).
    """
    places, firsts, everywhere = _laid_out(references)
    row = everywhere  # a 0 where the subsequence grew; the bit between references takes the carry of an addition
    rows = [row]
    for token in response:
        if here := row & places.get(token, 0):
            row = (row + here | row - here) & everywhere
        rows.append(row)
    width = everywhere.bit_length() // 8 + 1
    grown = b"".join([(everywhere ^ row).to_bytes(width, "little") for row in rows])
    bits = np.unpackbits(np.frombuffer(grown, np.uint8).reshape(-1, width), axis=1, bitorder="little")
    return np.add.reduceat(bits, firsts, axis=1, dtype=np.float64)


def _matches(response: Sequence[int], order: int, most: Mapping[tuple[int, ...], int]) -> list[bool]:
    """For each n-gram of the response: does it match, being no more often there so far than in any reference?"""
    grams = list(zip(*(response[i:] for i in range(order)), strict=False))
    if len(set(grams)) == len(grams):
        return [gram in most for gram in grams]
    used: Counter[tuple[int, ...]] = Counter()
    matches = []
    for gram in grams:
        used[gram] += 1
        matches.append(used[gram] <= most.get(gram, 0))
    return matches


@lru_cache(maxsize=KEPT_REFERENCES)
def _laid_out(references: tuple[tuple[int, ...], ...]) -> tuple[dict[int, int], list[int], int]:
    """The places of each token, each reference's first place, and all places there are."""
    places: dict[int, int] = {}
    firsts, first, everywhere = [], 0, 0
    for ids in references:
        for place, token in enumerate(ids, start=first):
            places[token] = places.get(token, 0) | 1 << place
        firsts.append(first)
        everywhere |= (1 << len(ids)) - 1 << first
        first += len(ids) + 1
    return places, firsts, everywhere


@lru_cache(maxsize=KEPT_REFERENCES)
def _most_in_a_reference(references: tuple[tuple[int, ...], ...]) -> dict[tuple[int, ...], int]:
    """How often each n-gram stands in the reference that has most of it; kept, as prompts come back."""
    most: dict[tuple[int, ...], int] = {}
    for ids in references:
        for gram, count in Counter(_ngrams(ids)).items():
            most[gram] = max(most.get(gram, 0), count)
    return most


def _ngrams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for n in range(1, LONGEST_NGRAM + 1) for i in range(len(ids) - n + 1)]
