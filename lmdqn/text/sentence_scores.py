"""Sentence BLEU and ROUGE at the speed of a corpus, equal bit for bit to what sacrebleu and rouge-score give.

Both libraries count the n-grams of the references again for every response, and split every text by regular
expressions. Here what the references say is gathered once and kept for the many responses that meet them, a word is
split once, and one integer holds a number for each reference, so that one addition counts for all of them.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from sacrebleu.metrics import BLEU

LONGEST_NGRAM = 4
FIELD = 24  # bits that each reference has in an integer that holds a number for each
ONE_FIELD = (1 << FIELD) - 1
KEPT_REFERENCES = 4096  # sets of references; some 40 KB each where there are four of 20 words
KEPT_WORDS = 2**17
_ALPHANUMERIC = re.compile("[a-z0-9]+")

Gram = Any  # a token, or a tuple of them


class _BleuReferences(NamedTuple):
    """What sentence BLEU asks of the references of a response."""

    lengths: list[int]
    grams: list[set[Gram]]  # for n = 1 .. 4, the n-grams of any reference
    repeated: dict[Gram, int]  # how often, for those that stand in a reference more than once


class _RougeReferences(NamedTuple):
    """What ROUGE-1, -2 and -L ask of the references of a response; reference k owns field k of each integer."""

    lengths: list[int]
    owners: list[dict[Gram, int]]  # for n = 1, 2: a 1 in the field of each reference that has the n-gram
    repeated: list[dict[Gram, list[int]]]  # for n = 1, 2: the same for a second time, a third, ...
    places: dict[str, int]  # the bits where a word stands, references one after the other, a bit between them
    spans: list[tuple[int, int]]  # first bit and mask of each reference in `places`
    everywhere: int  # all those masks


def sentence_bleu(
    responses: Sequence[str], references: Sequence[Sequence[str]], smoothing: str, lowercase: bool
) -> list[float]:
    """sacrebleu's `sentence_score` with effective order, 0 to 100."""
    scores = []
    for response, texts in zip(responses, references, strict=True):
        known = _bleu_references(tuple(texts), lowercase)
        tokens = _bleu_tokens(response, lowercase)
        correct = []
        for grams, of_references in zip(_ngrams(tokens), known.grams, strict=True):
            hits = [gram for gram in grams if gram in of_references]
            if len(set(hits)) == len(hits):
                correct.append(len(hits))
            else:
                correct.append(sum(min(c, known.repeated.get(gram, 1)) for gram, c in Counter(hits).items()))
        scores.append(_bleu(correct, len(tokens), known.lengths, smoothing))
    return scores


def rouge(responses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """rouge-score's F of ROUGE-1, ROUGE-2 and ROUGE-L without stemming, the best over the references."""
    scores: dict[str, list[float]] = {"rouge1": [], "rouge2": [], "rougeL": []}
    for response, texts in zip(responses, references, strict=True):
        known = _rouge_references(tuple(texts))
        tokens = rouge_tokens(response)
        for n, (kind, grams) in enumerate(zip(("rouge1", "rouge2"), _ngrams(tokens), strict=False)):
            shared = _shared(grams, known.owners[n], known.repeated[n])
            hits = [shared >> FIELD * k & ONE_FIELD for k in range(len(known.lengths))]
            scores[kind].append(
                max([_f_measure(h, len(tokens) - n, m - n) for h, m in zip(hits, known.lengths, strict=True)])
            )
        common = _common_subsequences(tokens, known)
        scores["rougeL"].append(
            max([_f_measure(c, len(tokens), m) for c, m in zip(common, known.lengths, strict=True)])
        )
    return scores


# --- tokens and n-grams -----------------------------------------------------------------------------------------------


@cache
def _tokenizer_13a() -> Any:
    return BLEU().tokenizer


@lru_cache(maxsize=KEPT_WORDS)
def _split_13a(word: str) -> list[str]:
    return _tokenizer_13a()(word).split()


@lru_cache(maxsize=KEPT_WORDS)
def _split_alphanumeric(word: str) -> list[str]:
    return _ALPHANUMERIC.findall(word.lower())


def _bleu_tokens(text: str, lowercase: bool) -> list[str]:
    """sacrebleu's 13a tokens. Its rules see no further than the next character, so each word is split by itself."""
    text = text.lower() if lowercase else text
    text = text.rstrip().replace("<skipped>", "").replace("-\n", "")
    return [token for word in text.split() for token in _split_13a(word)]


def rouge_tokens(text: str) -> list[str]:
    """rouge-score's tokens without stemming: runs of ASCII letters and digits, in lower case."""
    return [token for word in text.split() for token in _split_alphanumeric(word)]


def _ngrams(tokens: list[str]) -> Iterable[Iterable[Gram]]:
    """Tokens, pairs, threes and fours of them."""
    second, third = tokens[1:], tokens[2:]
    pairs = zip(tokens, second, strict=False)
    threes = zip(tokens, second, third, strict=False)
    return tokens, pairs, threes, zip(tokens, second, third, tokens[3:], strict=False)


# --- what the references say ------------------------------------------------------------------------------------------


@lru_cache(maxsize=KEPT_REFERENCES)
def _bleu_references(texts: tuple[str, ...], lowercase: bool) -> _BleuReferences:
    grams: list[set[Gram]] = [set() for _ in range(LONGEST_NGRAM)]
    repeated: dict[Gram, int] = {}
    lengths = []
    for text in texts:
        tokens = _bleu_tokens(text, lowercase)
        lengths.append(len(tokens))
        for n, of_order in enumerate(map(list, _ngrams(tokens))):
            grams[n].update(of_order)
            for gram, count in _repeated(of_order):
                repeated[gram] = max(count, repeated.get(gram, 1))
    return _BleuReferences(lengths, grams, repeated)


@lru_cache(maxsize=KEPT_REFERENCES)
def _rouge_references(texts: tuple[str, ...]) -> _RougeReferences:
    known = _RougeReferences([], [{}, {}], [{}, {}], {}, [], 0)
    bit, everywhere = 0, 0
    for k, tokens in enumerate(map(rouge_tokens, texts)):
        mine = 1 << FIELD * k
        for owners, repeated, of_order in zip(known.owners, known.repeated, map(list, _ngrams(tokens)), strict=False):
            for gram in set(of_order):
                owners[gram] = owners.get(gram, 0) + mine
            for gram, count in _repeated(of_order):
                times = repeated.setdefault(gram, [])
                times += [0] * (count - 1 - len(times))
                for j in range(count - 1):
                    times[j] += mine
        for place, token in enumerate(tokens, start=bit):
            known.places[token] = known.places.get(token, 0) | 1 << place
        known.lengths.append(len(tokens))
        known.spans.append((bit, (1 << len(tokens)) - 1))
        everywhere |= known.spans[-1][1] << bit
        bit += len(tokens) + 1
    return known._replace(everywhere=everywhere)


def _repeated(grams: list[Gram]) -> list[tuple[Gram, int]]:
    """Those that stand there more than once, and how often."""
    if len(set(grams)) == len(grams):
        return []
    return [(gram, count) for gram, count in Counter(grams).items() if count > 1]


# --- a response against them ------------------------------------------------------------------------------------------


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


def _shared(grams: Iterable[Gram], owners: dict[Gram, int], repeated: dict[Gram, list[int]]) -> int:
    """In each reference's field, how many of the grams it has, each at most as often as it has it."""
    grams = list(grams)
    different = set(grams)
    shared = sum([owners[gram] for gram in different if gram in owners])
    if len(different) < len(grams):
        for gram, times in repeated.items():
            shared += sum(times[: max(0, grams.count(gram) - 1)])
    return shared


def _common_subsequences(tokens: list[str], known: _RougeReferences) -> list[int]:
    """Length of the longest common subsequence with each reference, all by the same additions (Hyyrö 2004)."""
    places, everywhere = known.places, known.everywhere
    row = everywhere  # a 0 where the subsequence grew; the bit between references takes the carry of an addition
    for token in tokens:
        if token in places:
            here = row & places[token]
            row = (row + here | row - here) & everywhere
    return [(~(row >> first) & mask).bit_count() for first, mask in known.spans]


@lru_cache(maxsize=2**16)
def _f_measure(hits: int, of_response: int, of_reference: int) -> float:
    precision, recall = hits / max(of_response, 1), hits / max(of_reference, 1)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
