"""Intervals and p-values: known cases, exact enumeration, and sacrebleu itself as the oracle."""

from itertools import product

import numpy as np
import pytest
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from lmdqn.results.evaluate import Evaluation
from lmdqn.results.significance import Kind, paired_significance
from lmdqn.text.metrics import reference_streams

REFERENCES = [("the cat sat on the mat",), ("a dog barked at the moon", "the dog barked"), ("it rained all day long",)]
GOOD = ["the cat sat on the mat", "a dog barked at the old moon", "it rained all the day long"]
POOR = ["the cat sat", "a dog at the old moon", "it snowed all the day long"]


def system(responses: list[str], **per_response: list[float]) -> Evaluation:
    return Evaluation(responses, {}, per_response)


@pytest.mark.parametrize("kind", ["bootstrap", "randomisation"])
def test_equal_systems_differ_by_chance_and_constant_scores_have_no_width(kind: Kind) -> None:
    same = system(GOOD, reward=[0.5, 0.5, 0.5], length_words=[6.0, 7.0, 6.0])
    found = paired_significance({"a": same, "b": same}, "a", REFERENCES, 200, kind)
    assert found.p_value["b"] == {"reward": 1.0, "length_words": 1.0, "bleu": 1.0, "chrf": 1.0}
    assert found.interval["a"]["reward"] == (50.0, 50.0)
    low, high = found.interval["b"]["length_words"]
    assert 6.0 <= low < high <= 7.0


def test_a_gain_on_every_example_is_as_sure_as_the_resamples_allow() -> None:
    """The bootstrap's differences are all 0.1, so none lies as far from their mean as that lies from zero."""
    low, high = system(["x"] * 4, reward=[0.1, 0.2, 0.3, 0.4]), system(["y"] * 4, reward=[0.2, 0.3, 0.4, 0.5])
    found = paired_significance({"low": low, "high": high}, "low", [()] * 4, 199)
    assert found.p_value["high"] == {"reward": pytest.approx(1 / 200)}
    assert "low" not in found.p_value


def test_randomisation_agrees_with_counting_every_assignment() -> None:
    gains = [0.3, 0.2, -0.1, 0.4, 0.25]
    means = [abs(sum(s * g for s, g in zip(signs, gains, strict=True))) for signs in product((-1, 1), repeat=5)]
    exact = sum(mean >= sum(gains) - 1e-9 for mean in means) / 32
    zero, other = system(["x"] * 5, reward=[0.0] * 5), system(["y"] * 5, reward=gains)
    found = paired_significance({"zero": zero, "other": other}, "zero", [()] * 5, 4000, "randomisation")
    assert found.p_value["other"]["reward"] == pytest.approx(exact, abs=0.02)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_examples() -> None:
    scores = np.random.default_rng(0).uniform(size=400)
    found = paired_significance({"a": system([""] * 400, reward=scores.tolist())}, "a", [()] * 400, 2000)
    half = 1.96 * 100 * scores.std() / 20
    assert found.interval["a"]["reward"] == pytest.approx(
        (100 * scores.mean() - half, 100 * scores.mean() + half), abs=0.3
    )


@pytest.mark.parametrize(("kind", "test_type"), [("bootstrap", "bs"), ("randomisation", "ar")])
def test_corpus_bleu_is_tested_by_sacrebleu(kind: Kind, test_type: str) -> None:
    found = paired_significance({"good": system(GOOD), "poor": system(POOR)}, "poor", REFERENCES, 300, kind)
    metric = BLEU(references=reference_streams(REFERENCES))
    systems = [("poor", POOR), ("good", GOOD)]
    oracle = PairedTest(systems, {"BLEU": metric}, None, test_type, n_samples=300, n_ar_confidence=300)()[1]["BLEU"]
    assert found.p_value["good"]["bleu"] == oracle[1].p_value
    assert found.interval["poor"]["bleu"] == (oracle[0].mean - oracle[0].ci, oracle[0].mean + oracle[0].ci)
    assert found.interval["good"]["bleu"] == (oracle[1].mean - oracle[1].ci, oracle[1].mean + oracle[1].ci)
