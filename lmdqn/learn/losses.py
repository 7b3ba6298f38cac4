"""Losses: pure functions of tensors, summed over what they are given so that micro-batches add up to the batch."""

import torch
from torch import Tensor


def residual_loss(residuals: Tensor, mask: Tensor, huber_delta: float | None) -> Tensor:
    """Half the squared residual, or Huber's loss: linear with slope delta past |residual| = delta. Summed, ()."""
    magnitude = (residuals * mask).abs()
    if huber_delta is None:
        return 0.5 * magnitude.square().sum()
    linear = huber_delta * (magnitude - 0.5 * huber_delta)
    return torch.where(magnitude <= huber_delta, 0.5 * magnitude.square(), linear).sum()


def path_residuals(first_values: Tensor, log_ratios: Tensor, rewards: Tensor, mask: Tensor, beta: float) -> Tensor:
    """[V(s_1) + beta sum_t l_t - sum_t r_t] / beta, in nats: zero for every path at the soft optimum.

    Path consistency (Nachum et al. 2017, eq. 14, with the reference policy in place of the uniform one); valid for
    episodes of any behaviour policy. first_values (B,), log_ratios, rewards, mask (B, T) -> (B,).
    """
    return (first_values - (rewards * mask).sum(1)) / beta + (log_ratios * mask).sum(1)
