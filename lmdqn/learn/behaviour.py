"""A behaviour policy pi_b ~ pi_0 exp(b Q), as sharp as its distance from logged data may be."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lmdqn.episodes import Batch
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import over_vocabulary

SHARPEST, GRID = 2.0, 40  # b is tried from 0 to SHARPEST / beta, in GRID steps


def js_divergence(log_ratios: Tensor) -> Tensor:
    """Jensen-Shannon divergence of pi_b from mu in nats, from w = pi_b / mu at tokens sampled from mu.

    E_mu[log(2 / (1 + w)) + w log(2 w / (1 + w))] / 2, as an f-divergence. log w (N, K) -> (K,).
    """
    w = log_ratios.exp()
    to_middle = torch.nn.functional.softplus(log_ratios) - torch.log(torch.tensor(2.0))  # log((1 + w) / 2)
    return (0.5 * (w * (log_ratios - to_middle) - to_middle)).mean(0)


def mixed_log_probs(logits: Tensor, reference: Tensor, tokens: Tensor, shares: Sequence[float]) -> Tensor:
    """log of pi_0^(1 - c) pi^c, normalised, at the states' tokens for each c. (N, V), (N, V), (N,) -> (N, K)."""
    policy, prior = logits.log_softmax(-1), reference.log_softmax(-1)
    columns = []
    for share in shares:
        mixed = torch.lerp(prior, policy, share)
        columns.append(mixed.gather(-1, tokens[:, None]).squeeze(-1) - mixed.logsumexp(-1))
    return torch.stack(columns, dim=-1)


@torch.no_grad()
def fit_sharpness(networks: Networks, batches: Sequence[Batch], most_js_nats: float) -> tuple[float, float]:
    """c = b beta of the sharpest pi_b on the way from pi_0 (c = 0) within the bound, and its divergence from the data.

    The data's own behaviour log-probabilities are what it is held to; c is 0 where even pi_0 is farther.
    """
    shares = [SHARPEST * i / GRID for i in range(GRID + 1)]
    ratios = []
    for batch in batches:
        outputs = [networks.online(batch), networks.reference(batch)]
        log_probs = over_vocabulary(outputs, partial(mixed_log_probs, shares=shares), batch.actions)  # (N, K)
        behaviour = batch.behaviour_log_probs[batch.response_mask]
        ratios.append(log_probs[batch.acting] - behaviour[:, None])
    divergences = js_divergence(torch.cat(ratios)).tolist()
    chosen = 0
    while chosen < GRID and divergences[chosen + 1] <= most_js_nats:
        chosen += 1
    return shares[chosen], divergences[chosen]
