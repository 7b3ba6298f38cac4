"""Sentence BLEU and ROUGE equal sacrebleu's and rouge-score's to the last bit, whatever the texts are."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from lmdqn.text import metrics, sentence_scores

FEW_WORDS = st.lists(st.sampled_from(["the", "cat", "The", "sat", "on", ".", "a-b"]), max_size=14).map(" ".join)
PIECES = [*"aB1 \n\t.,-&;'\"<>/é\u0130\u03a3\u212a\u00a0\u2028\x1c中", "<skipped>", "&quot;", "-\n"]
LONG = st.lists(st.sampled_from(["the"] * 5 + ["cat", "sat", "on"]), min_size=60, max_size=400).map(" ".join)
AWKWARD = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
ANYTHING = st.text(max_size=25)
TEXT = FEW_WORDS | AWKWARD | ANYTHING
REFERENCES = st.lists(TEXT, min_size=1, max_size=5)
SMOOTHINGS = st.sampled_from(["exp", "floor", "add-k", "none"])


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(TEXT, REFERENCES, SMOOTHINGS, st.booleans())
def test_bleu_is_sacrebleus(response: str, references: list[str], smoothing: str, lowercase: bool) -> None:
    direct = BLEU(smooth_method=smoothing, effective_order=True, lowercase=lowercase)
    expected = direct.sentence_score(response, references).score / 100
    assert metrics.sentence_bleu([response], [references], smoothing, lowercase) == [expected]


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(TEXT, REFERENCES)
def test_rouge_is_rouge_scores(response: str, references: list[str]) -> None:
    direct = rouge_scorer.RougeScorer(list(metrics.ROUGE_TYPES)).score_multi(references, response)
    found = metrics.rouge([response], [references], metrics.ROUGE_TYPES)
    assert found == {kind: [direct[kind].fmeasure] for kind in metrics.ROUGE_TYPES}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(LONG, st.lists(FEW_WORDS | LONG, min_size=1, max_size=2))
@example("sat cat", ["the " * 10 + "cat" + " the" * 130 + " sat"])  # an addition carries over a whole word of bits
@example("the " * 300 + "cat sat", ["cat " + "the " * 280 + "sat", "the cat"])
def test_texts_longer_than_a_word_of_bits(response: str, references: list[str]) -> None:
    """References of more than 64 tokens, few different ones, and more than 255 of one."""
    check([response, ""], [references, references])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(FEW_WORDS, st.lists(FEW_WORDS, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_many_responses_at_once_score_as_each_alone(pairs: list[tuple[str, list[str]]]) -> None:
    """Whether they share references, or have differently many; and whether there is room for all of them together."""
    responses = [response for response, _ in pairs] * 2
    references = [texts for _, texts in pairs] * 2
    check(responses, references)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentence_scores, "AT_ONCE", 60)
        check(responses, references)


def check(responses: list[str], references: list[list[str]]) -> None:
    bleu, scorer = BLEU(effective_order=True), rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    pairs = list(zip(responses, references, strict=True))
    expected = [scorer.score_multi(texts, response) for response, texts in pairs]
    assert metrics.sentence_bleu(responses, references) == [bleu.sentence_score(*pair).score / 100 for pair in pairs]
    for kind, scores in metrics.rouge(responses, references, list(expected[0])).items():
        assert scores == [of_one[kind].fmeasure for of_one in expected]
