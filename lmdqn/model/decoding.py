"""Choosing a response with what Q-learning learnt: the policy, its Q-values, or the value of whole responses."""

from collections.abc import Callable, Sequence

import torch

from lmdqn.episodes import Episode, Example, make_batch
from lmdqn.model.exploration import Exploration
from lmdqn.model.qnetwork import QNetwork
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import DecodingSection

TOP_K_OF_THE_REFERENCE = 20
ALMOST_Q_ALONE = (
    1e4  # pi_0^(1 - c) pi^c: at so great a c, what is likeliest has the greatest log(pi / pi_0), which is Q
)


def respond(
    network: QNetwork,
    rollout: Rollout,
    examples: Sequence[Example],
    decoding: DecodingSection,
    seed: int,
    reference: Callable[[], QNetwork],
) -> list[str]:
    """A response to each example; `reference` is called where the reference network is needed."""
    groups = range(len(examples))
    sampling = Exploration(decoding.temperature, decoding.top_k)
    if decoding.method == "sample":
        return [e.text for e in rollout.sample(network, examples, 1, sampling, seed, groups)]
    if decoding.method == "top_q":
        top_k = decoding.top_k or TOP_K_OF_THE_REFERENCE
        by_q = Exploration(epsilon=0.0, reference_top_k=top_k, sharpness=ALMOST_Q_ALONE)
        return [e.text for e in rollout.sample(network, examples, 1, by_q, seed, groups, reference())]
    if decoding.method == "best_of_n":
        sampled = rollout.sample(network, examples, decoding.samples, sampling, seed, groups)
        greedy = rollout.sample(network, examples, 1, Exploration(epsilon=0.0), seed, groups)
        return [episode.text for episode in best_by_value(network, rollout, [*greedy, *sampled])]
    with network.active() as model:
        return rollout.greedy(model, examples, decoding.beams if decoding.method == "beam" else 1)


@torch.no_grad()
def best_by_value(network: QNetwork, rollout: Rollout, episodes: Sequence[Episode]) -> list[Episode]:
    """Of each group, by number, the episode whose last state before its end has the greatest value.

    That state's value is what is expected of the response as it stands: no references are looked at.
    """
    best: dict[int, tuple[float, Episode]] = {}
    for start in range(0, len(episodes), rollout.batch_examples):
        chunk = episodes[start : start + rollout.batch_examples]
        batch = make_batch(chunk, rollout.layout).to(network.device)
        values = batch.at_states(network(batch, need_logits=False).values)  # (B, T + 1)
        last = values.gather(1, batch.state_mask.sum(1, keepdim=True) - 1).squeeze(1)
        for episode, value in zip(chunk, last.tolist(), strict=True):
            if episode.group not in best or value > best[episode.group][0]:
                best[episode.group] = value, episode
    return [best[group][1] for group in sorted(best)]
