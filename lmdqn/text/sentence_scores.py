"""Sentence BLEU and ROUGE at the speed of a corpus, equal bit for bit to what sacrebleu and rouge-score give.

Both libraries count the n-grams of the references again for every response, and split every text by regular
expressions. Here a word is split once, and the references of a response are laid out once as one row of bits, a bit a
token: an integer then holds all places where a token or an n-gram stands in any of them, and no n-gram is ever built.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from itertools import chain, repeat
from operator import and_, lshift
from typing import Any, NamedTuple

from sacrebleu.metrics import BLEU

LONGEST_NGRAM = 4
KEPT_REFERENCES = 4096  # sets of references; some 10 KB each where there are four of 20 words
KEPT_WORDS = 2**14  # some 300 bytes each
_ALPHANUMERIC = re.compile("[a-z0-9]+")

Places = int  # a set of places in the row of references: those where an n-gram ends


class _References(NamedTuple):
    """The references of a response in one row of bits, one after the other with an empty bit between."""

    lengths: list[int]  # tokens
    spans: list[tuple[int, int]]  # first bit of each, and a mask of its length
    places: dict[str, Places]  # where each token stands
    everywhere: Places
    repeated: Places  # of tokens that stand more than once in a reference
    most: dict[Places, int]  # how often an n-gram stands in the reference that has most of it, once it was asked
    surplus: dict[tuple[Places, int], Places]  # where an n-gram stands in a reference for more than so many times


def sentence_bleu(
    responses: Sequence[str], references: Sequence[Sequence[str]], smoothing: str, lowercase: bool
) -> list[float]:
    """sacrebleu's `sentence_score` with effective order, 0 to 100."""
    scores = []
    for response, texts in zip(responses, references, strict=True):
        known = _bleu_references(tuple(texts), lowercase)
        tokens = _bleu_tokens(response, lowercase)
        correct = [_clipped(found, known) for found in _found(tokens, known, LONGEST_NGRAM)]
        scores.append(_bleu(correct, len(tokens), known.lengths, smoothing))
    return scores


def rouge(responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """rouge-score's F of ROUGE-1, ROUGE-2 and ROUGE-L without stemming, the best over the references."""
    scores: dict[str, list[float]] = {"rouge1": [], "rouge2": [], "rougeL": []}
    for response, texts in zip(responses, references, strict=True):
        known = _rouge_references(tuple(texts))
        tokens = rouge_tokens(response)
        ones, twos = _found(tokens, known, 2)
        for kind, less, hits in (
            ("rouge1", 0, _shared(ones, known)),
            ("rouge2", 1, _shared(twos, known)),
            ("rougeL", 0, _common_subsequences(ones, known)),
        ):
            written = len(tokens) - less
            of_each = [_f_measure(h, written, m - less) for h, m in zip(hits, known.lengths, strict=True)]
            scores[kind].append(max(of_each))
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


# --- what the references say ------------------------------------------------------------------------------------------


@lru_cache(maxsize=KEPT_REFERENCES)
def _bleu_references(texts: tuple[str, ...], lowercase: bool) -> _References:
    return _laid_out([_bleu_tokens(text, lowercase) for text in texts])


@lru_cache(maxsize=KEPT_REFERENCES)
def _rouge_references(texts: tuple[str, ...]) -> _References:
    return _laid_out([rouge_tokens(text) for text in texts])


def _laid_out(references: Sequence[list[str]]) -> _References:
    places: dict[str, Places] = {}
    spans, first, everywhere, repeated = [], 0, 0, 0
    for tokens in references:
        mask = (1 << len(tokens)) - 1
        spans.append((first, mask))
        everywhere |= mask << first
        for place, token in enumerate(tokens, start=first):
            before = places.get(token, 0)
            places[token] = before | 1 << place
            if before >> first:
                repeated |= places[token]
        first += len(tokens) + 1
    return _References([len(tokens) for tokens in references], spans, places, everywhere, repeated, {}, {})


# --- a response against them ------------------------------------------------------------------------------------------


def _found(tokens: Sequence[str], known: _References, longest: int) -> list[list[Places]]:
    """For n = 1 .. longest: where each n-gram of the response, in order, ends in the references; 0 is nowhere.

    It is at once a name for the n-gram: only equal ones end at the same places.
    """
    ones = list(map(known.places.get, tokens, repeat(0)))
    found = [ones]
    for n in range(1, longest):
        found.append(list(map(and_, map(lshift, found[-1], repeat(1)), ones[n:])))
    return found


def _clipped(found: list[Places], known: _References) -> int:
    """How many of a response's n-grams are found, each as often at most as in the reference that has most of it."""
    hits = len(found) - found.count(0)
    different = set(found)
    different.discard(0)
    if hits == len(different):
        return hits
    most = known.most
    for gram in different:
        if (count := found.count(gram)) > 1:
            if gram not in most:
                most[gram] = max(_in_each(gram, known))
            hits -= max(0, count - most[gram])
    return hits


def _shared(found: list[Places], known: _References) -> list[int]:
    """How many n-grams each reference shares with the response, each as often at most as either has it."""
    different = set(found)
    shared = sum(different)
    for gram in different:
        if gram & known.repeated:
            surplus = gram, found.count(gram)
            if surplus not in known.surplus:
                known.surplus[surplus] = _surplus(*surplus, known)
            shared -= known.surplus[surplus]
    return _in_each(shared, known)


def _surplus(places: Places, count: int, known: _References) -> Places:
    """The places that stand after the first `count` of their reference."""
    surplus = 0
    for first, mask in known.spans:
        here = places >> first & mask
        for _ in range(count):
            here &= here - 1 if here else 0  # drops the first
        surplus |= here << first
    return surplus


def _common_subsequences(ones: Iterable[Places], known: _References) -> list[int]:
    """Length of the longest common subsequence with each reference, all by the same additions (Hyyrö 2004)."""
    everywhere = known.everywhere
    row = everywhere  # a 0 where the subsequence grew; the bit between references takes the carry of an addition
    for places in ones:
        if places:
            here = row & places
            row = (row + here | row - here) & everywhere
    return _in_each(everywhere ^ row, known)


def _in_each(places: Places, known: _References) -> list[int]:
    """How many of the places lie in each reference."""
    return [(places >> first & mask).bit_count() for first, mask in known.spans]


def _bleu(correct: list[int], length: int, lengths: list[int], smoothing: str) -> float:
    """sacrebleu's `compute_bleu` with effective order, operation by operation (Chen & Cherry 2014)."""
    if not any(correct):
        return 0.0
    closest = min([(abs(length - n), n) for n in lengths])[1]
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


@lru_cache(maxsize=2**16)
def _f_measure(hits: int, of_response: int, of_reference: int) -> float:
    precision, recall = hits / max(of_response, 1), hits / max(of_reference, 1)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
