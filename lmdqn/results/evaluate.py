"""Evaluation: greedy responses and every metric."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from lmdqn.episodes import Example
from lmdqn.model.rollout import Rollout
from lmdqn.text import metrics
from lmdqn.text.rewards import Reward


@dataclass
class Evaluation:
    """Greedy responses to a split, and what they score."""

    responses: list[str]
    metrics: dict[str, float]  # 0 to 100, length in words, reward as the recipe mixes it times 100
    per_response: dict[str, list[float]]  # sentence scores in [0, 1] and reward; length_words in words


def evaluate_model(model: Any, rollout: Rollout, examples: Sequence[Example], reward: Reward) -> Evaluation:
    """Decode every example greedily with an ordinary transformers or peft model and score the responses."""
    return score_responses(rollout.greedy(model, examples), examples, reward)


def score_responses(responses: list[str], examples: Sequence[Example], reward: Reward) -> Evaluation:
    """Metrics of given responses, one for each example."""
    references = [example.references for example in examples]
    rewards = reward(responses, references, [example.source for example in examples])
    scores = metrics.response_scores(responses, references)
    corpus = metrics.table_metrics(responses, references, scores)
    per_response = {"reward": rewards, **scores}
    if all(references):
        per_response["sentence_bleu"] = metrics.sentence_bleu(responses, references)
    return Evaluation(responses, {"reward": 100 * fmean(rewards), **corpus}, per_response)
