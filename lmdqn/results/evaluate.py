"""Evaluation: greedy responses, every metric, intervals and paired significance."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from lmdqn.episodes import Example
from lmdqn.model.rollout import Rollout
from lmdqn.text import metrics
from lmdqn.text.rewards import Reward

BOOTSTRAP_SEED = 12345  # sacrebleu's own default


@dataclass
class Evaluation:
    """Greedy responses to a split, and what they score."""

    responses: list[str]
    metrics: dict[str, float]  # 0 to 100, length in words, reward as the recipe mixes it times 100
    per_response: dict[str, list[float]]  # sentence scores in [0, 1], for paired tests; and reward


def evaluate_model(model: Any, rollout: Rollout, examples: Sequence[Example], reward: Reward) -> Evaluation:
    """Decode every example greedily with an ordinary transformers or peft model and score the responses."""
    return score_responses(rollout.greedy(model, examples), examples, reward)


def score_responses(responses: list[str], examples: Sequence[Example], reward: Reward) -> Evaluation:
    """Metrics of given responses, one for each example."""
    references = [example.references for example in examples]
    rewards = reward(responses, references, [example.source for example in examples])
    per_response = {"reward": rewards}
    if all(references):
        per_response |= metrics.rouge(responses, references, metrics.ROUGE_TYPES)
        per_response["sentence_bleu"] = metrics.sentence_bleu(responses, references)
    corpus = metrics.corpus_metrics(responses, references)
    return Evaluation(responses, {"reward": 100 * fmean(rewards), **corpus}, per_response)


def paired_p_values(
    better: Evaluation, baseline: Evaluation, examples: Sequence[Example], samples: int
) -> dict[str, float]:
    """p of the paired bootstrap, two-sided, for corpus BLEU, mean ROUGE and mean reward (Koehn 2004, as in sacrebleu).

    Resample the examples with replacement, the same ones for both systems; p is the share of resamples whose
    difference lies at least as far from the observed difference as that lies from zero.
    """
    resamples = np.random.default_rng(BOOTSTRAP_SEED).integers(len(examples), size=(samples, len(examples)))
    p_values = {}
    for name in better.per_response.keys() & baseline.per_response.keys():
        gains = np.asarray(better.per_response[name]) - np.asarray(baseline.per_response[name])
        p_values[name] = _p_value(gains.mean(), gains[resamples].mean(axis=1))
    if all(example.references for example in examples):
        p_values["bleu"] = _bleu_p_value(better, baseline, examples, samples)
    return dict(sorted(p_values.items()))


def _p_value(observed: float, resampled: np.ndarray) -> float:
    extreme = np.abs(resampled - resampled.mean()) >= abs(observed)
    return float((extreme.sum() + 1) / (len(resampled) + 1))


def _bleu_p_value(better: Evaluation, baseline: Evaluation, examples: Sequence[Example], samples: int) -> float:
    """sacrebleu's own paired bootstrap."""
    if better.responses == baseline.responses:
        return 1.0  # sacrebleu's count of larger differences would be none
    systems = [("baseline", baseline.responses), ("better", better.responses)]
    streams = metrics.reference_streams([example.references for example in examples])
    test = PairedTest(systems, {"BLEU": BLEU(references=streams)}, None, test_type="bs", n_samples=samples)
    _, scores = test()
    return float(scores["BLEU"][1].p_value)
