"""Targets for Q: pure functions of tensors. B episodes of up to T tokens; rewards and values share one unit.

`values[:, t]` is V(s_t) for t = 0 .. T, and must be 0 in terminal states: V(s_n) of an episode that ended with EOS.
"""

import torch
from torch import Tensor


def one_step_targets(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    """y_t = r_t + gamma V(s_{t+1}); with V = max_a Q this is Q-learning (Mnih et al. 2015).

    rewards (B, T), values (B, T + 1) -> (B, T).
    """
    return rewards + gamma * values[:, 1:]


def lambda_targets(
    rewards: Tensor, values: Tensor, log_ratios: Tensor, mask: Tensor, gamma: float, trace: float, beta: float
) -> Tensor:
    """Soft TD(lambda): y_t = r_t + gamma {(1 - lambda) V(s_{t+1}) + lambda [y_{t+1} - beta l_{t+1}]}.

    The last token's target bootstraps from V(s_n) alone: zero after EOS, the value after a truncated response.
    Entropy-regularised with respect to the reference policy, as in path consistency learning (Nachum et al. 2017)
    and Q(lambda) of soft Q-learning (Haarnoja et al. 2017; Schulman et al. 2017, eq. 24).

    rewards, log_ratios (nats), mask (B, T); values (B, T + 1) -> (B, T), zero where the mask is.
    """
    length = rewards.shape[1]
    targets = torch.zeros_like(rewards)
    is_last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    for t in reversed(range(length)):
        following = values[:, t + 1]
        if t + 1 < length:
            returned = targets[:, t + 1] - beta * log_ratios[:, t + 1]
            mixed = (1 - trace) * values[:, t + 1] + trace * returned
            following = torch.where(is_last[:, t], values[:, t + 1], mixed)
        targets[:, t] = rewards[:, t] + gamma * following
    return targets * mask


def group_values(returns: Tensor, groups: Tensor) -> Tensor:
    """V(s_1) in closed form: for each episode the mean over its group of what the path left unexplained.

    `returns` is R - beta sum_t l_t; at the optimum it is the same for every response to a prompt and equals the
    soft value of the prompt. returns (B,), groups (B,) -> (B,), without gradient.
    """
    same = (groups[:, None] == groups[None, :]).to(returns.dtype)  # (B, B)
    return (same @ returns.detach()) / same.sum(1)
