"""Sentence BLEU and ROUGE equal sacrebleu's and rouge-score's to the last bit, whatever the texts are."""

from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from lmdqn.text import metrics

FEW_WORDS = st.lists(st.sampled_from(["the", "cat", "The", "sat", "on", ".", "a-b"]), max_size=14).map(" ".join)
PIECES = [*"aB1 \n\t.,-&;'\"<>/é\u0130\u03a3\u212a\u00a0\u2028\x1c中", "<skipped>", "&quot;", "-\n"]
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


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(FEW_WORDS, st.lists(FEW_WORDS, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_many_responses_at_once_and_again_score_as_each_alone(pairs: list[tuple[str, list[str]]]) -> None:
    """What is kept of references from earlier calls changes nothing."""
    responses, references = [r for r, _ in pairs], [refs for _, refs in pairs]
    direct = BLEU(effective_order=True)
    expected = [direct.sentence_score(r, refs).score / 100 for r, refs in pairs]
    assert metrics.sentence_bleu(responses, references) == expected
    assert metrics.sentence_bleu(responses[::-1], references[::-1]) == expected[::-1]
