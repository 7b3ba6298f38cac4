"""Evaluation: greedy responses and every metric."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from lmdqn.episodes import Example
from lmdqn.model.rollout import Rollout
from lmdqn.text import metrics
from lmdqn.text.rewards import Reward, TaskRewards


@dataclass
class Evaluation:
    """Greedy responses to a split, and what they score."""

    responses: list[str]
    metrics: dict[str, float]  # 0 to 100, length in words, reward as the recipe mixes it times 100
    per_response: dict[str, list[float]]  # sentence scores in [0, 1] and reward; length_words in words
    tasks: dict[str, "Evaluation"] = field(default_factory=dict)  # of several tasks, each one's own, in order

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "Evaluation":
        """What `dataclasses.asdict` took apart."""
        return cls(**{**tree, "tasks": {name: cls.of(part) for name, part in tree["tasks"].items()}})


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


def score_tasks(
    responses: list[str], examples: Sequence[Example], rewards: TaskRewards, weights: Mapping[str, float]
) -> Evaluation:
    """Metrics of given responses to one task's examples, or to several tasks', each task's in one piece.

    Of several tasks, each metric that all of them have is the mean over the tasks by their weights.
    """
    if len(rewards.of_task) == 1 and "" in rewards.of_task:
        return score_responses(responses, examples, rewards.of_task[""])
    tasks = {}
    for name, reward in rewards.of_task.items():
        mine = [i for i, example in enumerate(examples) if example.task == name]
        tasks[name] = score_responses([responses[i] for i in mine], [examples[i] for i in mine], reward)
    parts = list(tasks.values())
    shared = [metric for metric in parts[0].metrics if all(metric in part.metrics for part in parts)]
    scores = [score for score in parts[0].per_response if all(score in part.per_response for part in parts)]
    total = sum(weights.values())
    return Evaluation(
        responses,
        {m: sum(weights[name] * part.metrics[m] for name, part in tasks.items()) / total for m in shared},
        {s: [number for part in parts for number in part.per_response[s]] for s in scores},
        tasks,
    )
