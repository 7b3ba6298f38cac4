"""Losses: pure functions of tensors, summed over what they are given so that micro-batches add up to the batch."""

import torch
from torch import Tensor


def residual_loss(residuals: Tensor, weights: Tensor, huber_delta: float | None) -> Tensor:
    """Half the squared residual, or Huber's loss: linear with slope delta past |residual| = delta. Summed, ().

    residuals and weights of one shape; padding has the weight 0, and everything else 1 unless it is weighed.
    """
    magnitude = residuals.masked_fill(weights == 0, 0.0).abs()
    if huber_delta is None:
        return (weights * (0.5 * magnitude.square())).sum()
    linear = huber_delta * (magnitude - 0.5 * huber_delta)
    return (weights * torch.where(magnitude <= huber_delta, 0.5 * magnitude.square(), linear)).sum()


def path_residuals(
    first_values: Tensor, last_values: Tensor, log_ratios: Tensor, rewards: Tensor, discounts: Tensor, beta: float
) -> Tensor:
    """[V(s_1) - gamma^n V(s_n) + sum_t gamma^t (beta l_t - r_t)] / beta, in nats: zero for every path at the optimum.

    Path consistency (Nachum et al. 2017, eq. 14, with the reference policy in place of the uniform one); valid for
    episodes of any behaviour policy. first_values, last_values, discounted (B,), log_ratios and rewards (B, T), zero
    on padding, discounts (T,) -> (B,).
    """
    returned = (discounts * rewards).sum(1) + last_values
    return (first_values - returned) / beta + (discounts * log_ratios).sum(1)


def quantile_loss(quantiles: Tensor, samples: Tensor, weights: Tensor, kappa: float = 1.0) -> Tensor:
    """Quantile Huber loss of K quantiles, at the levels (k + 1/2)/K, of one sample each (Dabney et al. 2018, eq. 10).

    quantiles (N, K), samples (N,), weights (N,) -> () the mean over quantiles, summed over samples.
    """
    count = quantiles.shape[-1]
    levels = (torch.arange(count, device=quantiles.device) + 0.5) / count
    error = samples[:, None] - quantiles  # (N, K)
    size = error.abs()
    huber = torch.where(size <= kappa, 0.5 * error.square(), kappa * (size - 0.5 * kappa))
    return (weights[:, None] * (levels - (error < 0).float()).abs() * huber / kappa).mean(-1).sum()
