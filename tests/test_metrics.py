"""Metrics against direct calls of sacrebleu and rouge-score, and the rest against numbers worked by hand."""

from statistics import fmean

import pytest
import sacrebleu
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU, CHRF

from lmdqn.text import metrics

RESPONSES = [
    "the cat sat on the mat",
    "A dog barks at the moon tonight .",
    "completely unrelated words",
    "",
    "the the the the the the",
    "First line.\nSecond line, with The Cat.",
]
REFERENCES = [
    ["the cat is on the mat", "there is a cat on the mat"],
    ["a dog barks at the full moon tonight ."],
    ["nothing in common here", "nor here", "nor even there at all"],
    ["something"],
    ["the cat", "the the"],
    ["Second line with the cat.\nFirst line!", "first line."],
]


@pytest.mark.parametrize("smoothing", ["exp", "floor", "add-k", "none"])
@pytest.mark.parametrize("lowercase", [False, True])
def test_sentence_bleu_is_sacrebleus(smoothing: str, lowercase: bool) -> None:
    direct = [
        sacrebleu.sentence_bleu(
            response, references, smooth_method=smoothing, lowercase=lowercase, use_effective_order=True
        ).score
        for response, references in zip(RESPONSES, REFERENCES, strict=True)
    ]
    found = metrics.sentence_bleu(RESPONSES, REFERENCES, smoothing, lowercase)
    assert found == pytest.approx([score / 100 for score in direct], abs=1e-12)


def test_sentence_bleu_by_hand() -> None:
    """Two words, both right, for a reference of three: precision 1 by effective order, brevity exp(1 - 3/2)."""
    assert metrics.sentence_bleu(["a b"], [["a b c"]]) == pytest.approx([0.6065306597], abs=1e-9)
    assert metrics.sentence_bleu(["a b c"], [["x y", "a b c"]]) == pytest.approx([1.0])


def test_lowercase_counts_in_bleu_and_chrf_only_when_asked() -> None:
    for score in (metrics.sentence_bleu, metrics.sentence_chrf):
        assert score(["THE CAT"], [["the cat"]])[0] < 0.1
        assert score(["THE CAT"], [["the cat"]], lowercase=True) == pytest.approx([1.0])


@pytest.mark.parametrize("lowercase", [False, True])
def test_sentence_chrf_is_sacrebleus(lowercase: bool) -> None:
    chrf = CHRF(lowercase=lowercase)
    direct = [chrf.sentence_score(h, r).score / 100 for h, r in zip(RESPONSES, REFERENCES, strict=True)]
    assert metrics.sentence_chrf(RESPONSES, REFERENCES, lowercase) == pytest.approx(direct, abs=1e-12)
    assert 0 < direct[0] < 1


def test_rouge_is_rouge_scores_best_over_references() -> None:
    kinds = list(metrics.ROUGE_TYPES)
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=False)
    found = metrics.rouge(RESPONSES, REFERENCES, kinds)
    assert list(found) == kinds
    for i, (response, references) in enumerate(zip(RESPONSES, REFERENCES, strict=True)):
        direct = scorer.score_multi(references, response)
        assert {kind: found[kind][i] for kind in kinds} == {kind: direct[kind].fmeasure for kind in kinds}


def test_rouge_by_hand() -> None:
    """Three of four words in order, out of a reference of five: P 3/4, R 3/5, F 2/3; bigrams: 1 of 3 and of 4."""
    found = metrics.rouge(["a b x e"], [["a b c d e"]], ["rouge1", "rouge2", "rougeL"])
    assert found["rouge1"] == pytest.approx([2 / 3])
    assert found["rougeL"] == pytest.approx([2 / 3])
    assert found["rouge2"] == pytest.approx([2 / 7])


def test_rouge_lsum_takes_lines_for_sentences() -> None:
    found = metrics.rouge(["b\na"], [["a\nb"]], ["rougeL", "rougeLsum"])
    assert found == {"rougeL": [0.5], "rougeLsum": [1.0]}


def test_rouge_does_not_stem() -> None:
    assert metrics.rouge(["cats"], [["cat"]], ["rouge1"]) == {"rouge1": [0.0]}


@pytest.mark.parametrize(
    ("response", "references", "match"),
    [
        ("one two three", ["a b c"], 1.0),
        ("one two three", ["a b c d"], 3 / 4),
        ("one two three four", ["a"], 1 / 4),
        ("one two three", ["a", "a b c d", "a b c d e f g"], 3 / 4),  # 12 words over three references
        ("one two three", ["a", "a b"], 1 / 2),
        ("", ["a b"], 0.0),
        ("one", [""], 0.0),
        ("  one \n two ", ["a b"], 1.0),
    ],
)
def test_length_match(response: str, references: list[str], match: float) -> None:
    assert metrics.length_match([response], [references]) == [match]


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ("a b c d", 0.0),
        ("a b c", 0.0),
        ("", 0.0),
        ("a a a a a", 1 / 2),  # two 4-grams, the second a repeat
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("a b c d A B C D", 1 / 5),
        ("x x x x x x x", 3 / 4),
    ],
)
def test_repeated_4grams(response: str, share: float) -> None:
    assert metrics.repeated_4grams([response]) == [pytest.approx(share)]


@pytest.mark.parametrize(
    ("responses", "share"),
    [
        (["a b c"], 1.0),
        (["a b c", "a b d"], 3 / 4),  # ab bc ab bd
        (["a b", "A b", "a B"], 1 / 3),
        (["a", "b"], 0.0),
        (["a a a a"], 1 / 3),
    ],
)
def test_distinct_2(responses: list[str], share: float) -> None:
    assert metrics.distinct_2(responses) == pytest.approx(share)


def test_references_of_differing_number_become_streams() -> None:
    streams = metrics.reference_streams([["a"], ["b", "c", "d"], ["e", "f"]])
    assert streams == [["a", "b", "e"], [None, "c", "f"], [None, "d", None]]


@pytest.mark.parametrize("lowercase", [False, True])
def test_corpus_scores_are_sacrebleus(lowercase: bool) -> None:
    streams = [[references[k] if k < len(references) else None for references in REFERENCES] for k in range(3)]
    bleu = BLEU(lowercase=lowercase).corpus_score(RESPONSES, streams).score
    chrf = CHRF(lowercase=lowercase).corpus_score(RESPONSES, streams).score
    assert metrics.corpus_bleu(RESPONSES, REFERENCES, lowercase) == bleu
    assert metrics.corpus_chrf(RESPONSES, REFERENCES, lowercase) == chrf
    assert 1 < bleu < 100
    assert 1 < chrf < 100


def test_corpus_bleu_sees_every_reference() -> None:
    assert metrics.corpus_bleu(["a b c d e"], [["v w x y z", "a b c d e"]]) == pytest.approx(100)
    assert metrics.corpus_bleu(["a b c d e", "f g h i j"], [["a b c d e"], ["x", "f g h i j"]]) == pytest.approx(100)


def test_corpus_metrics_gather_all_of_them() -> None:
    found = metrics.corpus_metrics(RESPONSES, REFERENCES)
    rouges = metrics.rouge(RESPONSES, REFERENCES, metrics.ROUGE_TYPES)
    assert found == {
        "bleu": metrics.corpus_bleu(RESPONSES, REFERENCES),
        **{kind: pytest.approx(100 * fmean(scores)) for kind, scores in rouges.items()},
        "chrf": metrics.corpus_chrf(RESPONSES, REFERENCES),
        "length_words": (6 + 8 + 3 + 0 + 6 + 7) / 6,
        "distinct2": 100 * metrics.distinct_2(RESPONSES),
        "repeated_4grams": pytest.approx(100 * (2 / 3) / 6),  # "the the the the" three times
    }


def test_corpus_metrics_without_references() -> None:
    assert metrics.corpus_metrics(["a b c", "a b"], [(), ()]) == {
        "length_words": 2.5,
        "distinct2": pytest.approx(100 * 2 / 3),
        "repeated_4grams": 0.0,
    }
