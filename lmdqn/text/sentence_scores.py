"""Sentence BLEU and ROUGE at the speed of a corpus, equal bit for bit to what sacrebleu and rouge-score give.

Both libraries count n-grams in dictionaries, response by response, and split every text by regular expressions. Here a
word is split once, and a token becomes the bits of the places where it stands in each reference of its response.
Shifted and intersected, of all responses at once, they are the places of n-grams, and no n-gram is ever built.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from itertools import chain, count, repeat, zip_longest
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU

LONGEST_NGRAM = 4
KEPT_WORDS = 2**14  # some 300 bytes each
AT_ONCE = 2**21  # responses together: as many words of bits for each of their characters
WORD = 64  # bits
CHARACTERS = 5 * WORD  # of as many tokens, about
_ALPHANUMERIC = re.compile("[a-z0-9]+")


class _Texts(NamedTuple):
    """N tokens of B responses, those of one after those of another, and their R references, W words of bits each.

    Where responses have differently many references, the others have -1 tokens and stand nowhere.
    """

    tokens: NDArray[np.int64]  # (N,) the same for equal tokens of a response alone; one more ends each response
    starts: NDArray[np.int64]  # (B,) where in them each response begins
    lengths: NDArray[np.int64]  # (B,) tokens of each response
    of_references: NDArray[np.int64]  # (R, B) tokens of each of its references
    places: NDArray[np.uint64]  # (W, R, N) where each token stands in each reference


def sentence_bleu(
    responses: Sequence[str], references: Sequence[Sequence[str]], smoothing: str, lowercase: bool
) -> list[float]:
    """sacrebleu's `sentence_score` with effective order, 0 to 100."""
    scores: list[float] = []
    for texts in _read(responses, references, lambda text: _bleu_tokens(text, lowercase)):
        hits = np.stack([hit.any(0) for hit in _hits(texts, LONGEST_NGRAM)])  # (4, N)
        correct = zip(*np.add.reduceat(hits, texts.starts, axis=1, dtype=np.int64).tolist(), strict=True)
        scores += map(_bleu, correct, texts.lengths.tolist(), _closest(texts), repeat(smoothing))
    return scores


def rouge(responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """rouge-score's F of ROUGE-1, ROUGE-2 and ROUGE-L without stemming, the best over the references."""
    scores: dict[str, list[float]] = {"rouge1": [], "rouge2": [], "rougeL": []}
    for texts in _read(responses, references, rouge_tokens):
        ones, twos = (np.add.reduceat(hit, texts.starts, axis=1, dtype=np.int64) for hit in _hits(texts, 2))  # (R, B)
        scores["rouge1"] += _best_f_measure(ones, texts, 1)
        scores["rouge2"] += _best_f_measure(twos, texts, 2)
        scores["rougeL"] += _best_f_measure(_common_subsequences(texts), texts, 1)
    return scores


# --- tokens -----------------------------------------------------------------------------------------------------------


class _Kept(dict[str, list[str]]):
    """The tokens of words by a tokenizer, each word split once."""

    def __init__(self, split: Callable[[str], list[str]]):
        super().__init__()
        self._split = split

    def __missing__(self, word: str) -> list[str]:
        if len(self) >= KEPT_WORDS:
            self.clear()
        tokens = self[word] = self._split(word)
        return tokens

    def tokens(self, text: str) -> list[str]:
        return list(chain.from_iterable(map(self.__getitem__, text.split())))


@cache
def _tokenizer_13a() -> Any:
    return BLEU().tokenizer


_words_13a = _Kept(lambda word: _tokenizer_13a()(word).split())
_words_alphanumeric = _Kept(lambda word: _ALPHANUMERIC.findall(word.lower()))


def _bleu_tokens(text: str, lowercase: bool) -> list[str]:
    """sacrebleu's 13a tokens. Its rules see no further than the next character, so each word is split by itself."""
    text = text.lower() if lowercase else text
    return _words_13a.tokens(text.rstrip().replace("<skipped>", "").replace("-\n", ""))


def rouge_tokens(text: str) -> list[str]:
    """rouge-score's tokens without stemming: runs of ASCII letters and digits, in lower case."""
    return _words_alphanumeric.tokens(text)


# --- responses and references as bits ---------------------------------------------------------------------------------


def _read(
    responses: Sequence[str], references: Sequence[Sequence[str]], tokens_of: Callable[[str], list[str]]
) -> Iterator[_Texts]:
    """As many at a time, in order, as there is room for."""
    first, room = 0, AT_ONCE
    for i, (response, texts) in enumerate(zip(responses, references, strict=True)):
        size = len(response) * sum(1 + len(text) // CHARACTERS for text in texts)
        if room < size and i > first:
            yield _laid_out(responses[first:i], references[first:i], tokens_of)
            first, room = i, AT_ONCE
        room -= size
    if first < len(responses):
        yield _laid_out(responses[first:], references[first:], tokens_of)


def _laid_out(
    responses: Sequence[str], references: Sequence[Sequence[str]], tokens_of: Callable[[str], list[str]]
) -> _Texts:
    new = count(1).__next__  # numbers a token in one set of references; 0 is one that none of them has
    known: dict[tuple[str, ...], tuple[int, dict[str, int]]] = {}  # sets of references, which responses share
    of_sets: list[list[list[int]]] = []  # the numbers of each reference of each set
    written: list[int] = []  # those of all responses
    lengths, sets = [], []
    for response, texts in zip(responses, references, strict=True):
        key = tuple(texts)
        if key not in known:
            known[key] = len(of_sets), defaultdict(new)
            of_sets.append([list(map(known[key][1].__getitem__, tokens_of(text))) for text in texts])
        which, number_of = known[key]
        tokens = tokens_of(response)
        written += map(number_of.get, tokens, repeat(0))
        written.append(0)
        lengths.append(len(tokens))
        sets.append(which)
    size, numbers, spans = new(), np.array(written), np.array(lengths) + 1
    of_references = zip_longest(*(map(len, texts) for texts in of_sets), fillvalue=-1)
    return _Texts(
        tokens=numbers + size * np.repeat(np.arange(len(spans)), spans),
        starts=np.cumsum(spans) - spans,
        lengths=spans - 1,
        of_references=np.array(list(of_references))[:, sets],
        places=_places(of_sets, size).take(numbers, axis=-1),
    )


def _places(of_sets: list[list[list[int]]], size: int) -> NDArray[np.uint64]:
    """(W, R, size) where the token of each number stands in each reference of its set."""
    standing = list(chain.from_iterable(of_sets))
    numbers = np.array(list(chain.from_iterable(standing)), np.int64)
    lengths = np.array(list(map(len, standing)))
    row = np.repeat(list(chain.from_iterable(map(range, map(len, of_sets)))), lengths)  # of each token
    place = np.arange(len(numbers)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    words, rows = (int(lengths.max()) - 1) // WORD + 1, max(map(len, of_sets))
    places = np.zeros((max(words, 1), rows, size), np.uint64)
    cell = (place // WORD * rows + row) * size + numbers
    np.add.at(places.reshape(-1), cell, np.uint64(1) << (place % WORD).astype(np.uint64))
    return places


# --- responses against references -------------------------------------------------------------------------------------


def _hits(texts: _Texts, longest: int) -> Iterator[NDArray[np.bool_]]:
    """For n = 1 .. longest, (R, N): is the n-gram that ends at a token of a response found in the reference?

    Each is found as often at most as either has it: no longer when it stood in the response as often before as it
    stands in the reference. What crosses the end of a response stands nowhere.
    """
    ends = texts.places  # (W, R, N) where the n-gram ends in each reference
    for n, earlier in enumerate(_earlier(texts, longest)):
        if n:
            ends = _next_places(ends) & texts.places
        yield np.bitwise_count(ends).sum(0, dtype=earlier.dtype) > earlier


def _next_places(places: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One place on in the references, for the next token of the response."""
    moved = np.zeros_like(places)
    np.left_shift(places[..., :-1], np.uint64(1), out=moved[..., 1:])
    moved[1:, :, 1:] |= places[:-1, :, :-1] >> np.uint64(WORD - 1)
    return moved


def _earlier(texts: _Texts, longest: int) -> NDArray[Any]:
    """(longest, N) for n = 1 .. longest, how often the n-gram that ends at a token stood in the response before."""
    tokens, most = texts.tokens, int(texts.lengths.max())
    kind = np.min_scalar_type(max(most, int(texts.of_references.max()), 1))
    earlier = np.zeros((longest, len(tokens)), kind)
    for distance in range(1, most):
        same = tokens[distance:] == tokens[:-distance]
        for n, times in enumerate(earlier):
            times[distance + n :] += same.view(np.uint8)
            same = same[1:] & same[:-1]
    return earlier


def _common_subsequences(texts: _Texts) -> NDArray[np.int64]:
    """(R, B) length of the longest common subsequence with each reference, by an addition a token (Hyyrö 2004)."""
    order = np.argsort(-texts.lengths, kind="stable")  # longest first, so that those with a token more come first
    starts, lengths = texts.starts[order], texts.lengths[order]
    words, references, _ = texts.places.shape
    rows = np.full((words, references, len(order)), ~np.uint64(0))  # a 0 where the subsequence grew
    for place in range(lengths[0]):
        longer = int(np.searchsorted(-lengths, -place))
        row = rows[..., :longer]
        here = texts.places.take(starts[:longer] + place, axis=-1) & row
        row[:] = _sum(row, here) | (row - here)
    common = np.empty((references, len(order)), np.int64)
    common[:, order] = np.bitwise_count(~rows).sum(0, dtype=np.int64)
    return common


def _sum(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """a + b of numbers of W words, the lowest first; what goes over is dropped."""
    total = a + b
    carry = total[0] < a[0]
    for word in range(1, len(total)):
        without = total[word].copy()
        total[word] += carry
        carry = (without < a[word]) | (total[word] < without)
    return total


# --- scores -----------------------------------------------------------------------------------------------------------


def _closest(texts: _Texts) -> list[int]:
    """(B,) tokens of the reference whose length is closest to the response's, of two such the shorter."""
    far, ours = 2**32, texts.of_references
    rank = np.abs(ours - texts.lengths) * far + ours
    return (np.where(ours < 0, far**2 // 2 - 1, rank).min(0) % far).tolist()


@lru_cache(maxsize=2**16)
def _bleu(correct: tuple[int, ...], length: int, closest: int, smoothing: str) -> float:
    """sacrebleu's `compute_bleu` with effective order, operation by operation (Chen & Cherry 2014)."""
    if not any(correct):
        return 0.0
    brevity = math.exp(1 - closest / length) if length < closest else 1.0
    logs, halving = [], 1.0
    for n, right in enumerate(correct):
        possible = max(0, length - n)
        if smoothing == "add-k" and n > 0:
            right, possible = right + 1, possible + 1
        if possible == 0:
            break
        precision = 100.0 * right / possible
        if right == 0 and smoothing == "exp":
            halving *= 2
            precision = 100.0 / (halving * possible)
        elif right == 0 and smoothing == "floor":
            precision = 100.0 * 0.1 / possible
        logs.append(math.log(precision) if precision > 0 else -9999999999)
    return brevity * math.exp(sum(logs) / len(logs))


def _best_f_measure(hits: NDArray[np.int64], texts: _Texts, n: int) -> list[float]:
    """(R, B) n-grams that response and reference share -> (B,) F of the best reference."""
    precision = hits / np.maximum(texts.lengths - (n - 1), 1)
    recall = hits / np.maximum(texts.of_references - (n - 1), 1)
    both = precision + recall
    return np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0).max(0).tolist()
