"""Text metrics as sacrebleu and rouge-score give them; strings in, numbers out.

Sentence functions give one number in [0, 1] for each response. BLEU and chrF of a corpus are on the usual
0-100 scale, and so are the means that `corpus_metrics` reports.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

from lmdqn.text import sentence_scores

References = Sequence[Sequence[str]]  # for each response its references
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def sentence_bleu(
    responses: Sequence[str], references: References, smoothing: str = "exp", lowercase: bool = False
) -> list[float]:
    """sacrebleu's sentence BLEU with effective order, over 100 (Papineni et al. 2002; Chen & Cherry 2014)."""
    return [score / 100 for score in sentence_scores.sentence_bleu(responses, references, smoothing, lowercase)]


def sentence_chrf(responses: Sequence[str], references: References, lowercase: bool = False) -> list[float]:
    """sacrebleu's sentence chrF2, over 100 (Popović 2015)."""
    chrf = CHRF(lowercase=lowercase)
    return [chrf.sentence_score(h, list(r)).score / 100 for h, r in zip(responses, references, strict=True)]


def rouge(responses: Sequence[str], references: References, kinds: Sequence[str]) -> dict[str, list[float]]:
    """rouge-score's F measure without stemming, for each response the best over its references (Lin 2004).

    ROUGE-Lsum takes lines for sentences, as rouge-score does.
    """
    scores = sentence_scores.rouge(responses, references)
    if "rougeLsum" in kinds:
        scores["rougeLsum"] = [
            _rouge_lsum(response, refs) if any("\n" in text for text in (response, *refs)) else of_one_line
            for response, refs, of_one_line in zip(responses, references, scores["rougeL"], strict=True)
        ]
    return {kind: scores[kind] for kind in kinds}


def length_match(responses: Sequence[str], references: References) -> list[float]:
    """Words of the response and mean words of its references, the smaller over the larger: 1 is equal.

    Best-over-references metrics are easiest to please by the shortest reference; this pulls towards the usual length.
    """
    matches = []
    for response, refs in zip(responses, references, strict=True):
        words, usual = len(response.split()), fmean(len(r.split()) for r in refs)
        matches.append(min(words, usual) / max(words, usual, 1))
    return matches


def repeated_4grams(responses: Sequence[str]) -> list[float]:
    """Share of each response's word 4-grams that already stood earlier in it."""
    shares = []
    for response in responses:
        grams = _ngrams(response, 4)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return shares


def distinct_2(responses: Sequence[str]) -> float:
    """Different word bigrams over all word bigrams of the corpus (Li et al. 2016)."""
    grams = Counter(gram for response in responses for gram in _ngrams(response, 2))
    return len(grams) / max(1, grams.total())


def corpus_bleu(responses: Sequence[str], references: References, lowercase: bool = False) -> float:
    """sacrebleu's corpus BLEU, 0 to 100, with all references."""
    score = BLEU(lowercase=lowercase).corpus_score(list(responses), reference_streams(references)).score
    for tokenizer in (Tokenizer13a, TokenizerRegexp):  # each keeps 65,536 texts: as many megabytes, when they are long
        tokenizer.__call__.cache_clear()
    return score


def corpus_chrf(responses: Sequence[str], references: References, lowercase: bool = False) -> float:
    """sacrebleu's corpus chrF2, 0 to 100."""
    return CHRF(lowercase=lowercase).corpus_score(list(responses), reference_streams(references)).score


def corpus_metrics(responses: Sequence[str], references: References) -> dict[str, float]:
    """Every metric that a table may show, rewarded or not. Means and corpus scores are 0 to 100, length is in words.

    Without references only length, distinct-2 and repeated 4-grams are given.
    """
    return table_metrics(responses, references, response_scores(responses, references))


def response_scores(responses: Sequence[str], references: References) -> dict[str, list[float]]:
    """What `corpus_metrics` takes means of, for each response: length in words, all else in [0, 1]."""
    scores = {
        "length_words": [float(len(response.split())) for response in responses],
        "repeated_4grams": repeated_4grams(responses),
    }
    return scores | (rouge(responses, references, ROUGE_TYPES) if all(references) else {})


def table_metrics(
    responses: Sequence[str], references: References, scores: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """`corpus_metrics` where the responses' own scores are known."""
    metrics = {
        "length_words": fmean(scores["length_words"]),
        "distinct2": 100 * distinct_2(responses),
        "repeated_4grams": 100 * fmean(scores["repeated_4grams"]),
    }
    if not all(references):
        return metrics
    return {
        "bleu": corpus_bleu(responses, references),
        **{kind: 100 * fmean(scores[kind]) for kind in ROUGE_TYPES},
        "chrf": corpus_chrf(responses, references),
        **metrics,
    }


def reference_streams(references: References) -> list[list[str | None]]:
    """sacrebleu's form: stream k holds everybody's reference number k, None where there are fewer."""
    longest = max(len(refs) for refs in references)
    return [[refs[k] if k < len(refs) else None for refs in references] for k in range(longest)]


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _rouge_lsum(response: str, references: Sequence[str]) -> float:
    """ROUGE-Lsum where there are lines to take for sentences; of one line it is ROUGE-L."""
    return _lsum_scorer().score_multi(list(references), response)["rougeLsum"].fmeasure


@cache
def _lsum_scorer() -> Any:
    from rouge_score import rouge_scorer  # here, as it brings all of NLTK

    return rouge_scorer.RougeScorer(["rougeLsum"], tokenizer=_Tokenizer())


class _Tokenizer:
    """rouge-score's own tokens."""

    def tokenize(self, text: str) -> list[str]:
        return sentence_scores.rouge_tokens(text)
