"""Choosing a response: by the policy, its Q-values, the value of whole responses, or how far samples agree."""

from collections.abc import Callable, Sequence

import torch

from lmdqn.episodes import Episode, Example, make_batch
from lmdqn.model.exploration import Exploration
from lmdqn.model.qnetwork import QNetwork
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import Recipe
from lmdqn.text.agreement import agreement
from lmdqn.text.rewards import TaskRewards

TOP_K_OF_THE_REFERENCE = 20
ALMOST_Q_ALONE = (
    1e4  # pi_0^(1 - c) pi^c: at so great a c, what is likeliest has the greatest log(pi / pi_0), which is Q
)


def respond(
    network: QNetwork,
    rollout: Rollout,
    examples: Sequence[Example],
    groups: Sequence[int],
    recipe: Recipe,
    reference: Callable[[], QNetwork],
    rewards: Callable[[], TaskRewards],
) -> list[str]:
    """A response to each example, decoded as the recipe says.

    An example draws the random numbers of its group. `reference` and `rewards` are called where they are needed.
    """
    decoding, seed = recipe.decoding, recipe.seed
    sampling = Exploration(decoding.temperature, decoding.top_k)
    if decoding.method == "sample":
        return [e.text for e in rollout.sample(network, examples, 1, sampling, seed, groups)]
    if decoding.method == "top_q":
        top_k = decoding.top_k or TOP_K_OF_THE_REFERENCE
        sharpness = None if recipe.qlearning.form == "classic" else ALMOST_Q_ALONE  # classic: Q is the logit itself
        by_q = Exploration(epsilon=0.0, reference_top_k=top_k, sharpness=sharpness)
        return [e.text for e in rollout.sample(network, examples, 1, by_q, seed, groups, reference())]
    if decoding.method in ("best_of_n", "minimum_bayes_risk"):
        sampled = rollout.sample(network, examples, decoding.samples, sampling, seed, groups)
        candidates = [*rollout.sample(network, examples, 1, Exploration(epsilon=0.0), seed, groups), *sampled]
        by_value = decoding.method == "best_of_n"
        scores = last_values(network, rollout, candidates) if by_value else agreement(candidates, sampled, rewards())
        return [episode.text for episode in best_of_each_group(candidates, scores)]
    with network.active() as model:
        return rollout.greedy(model, examples, decoding.beams if decoding.method == "beam" else 1)


@torch.no_grad()
def last_values(network: QNetwork, rollout: Rollout, episodes: Sequence[Episode]) -> list[float]:
    """The value of each episode's last state before its end.

    That is what is expected of the response as it stands: no references are looked at.
    """
    found: list[float] = []
    for start in range(0, len(episodes), rollout.batch_examples):
        batch = make_batch(episodes[start : start + rollout.batch_examples], rollout.layout).to(network.device)
        values = batch.at_states(network(batch, need_logits=False).values)  # (B, T + 1)
        found += values.gather(1, batch.state_mask.sum(1, keepdim=True) - 1).squeeze(1).tolist()
    return found


def best_of_each_group(episodes: Sequence[Episode], scores: Sequence[float]) -> list[Episode]:
    """Of each group, by number, the episode with the greatest score, the first of equal ones."""
    best: dict[int, tuple[float, Episode]] = {}
    for episode, score in zip(episodes, scores, strict=True):
        if episode.group not in best or score > best[episode.group][0]:
            best[episode.group] = score, episode
    return [best[group][1] for group in sorted(best)]
