"""Targets for Q: pure functions of tensors. B episodes of up to T tokens; rewards and values share one unit.

`values[:, t]` is V(s_t) for t = 0 .. T, and must be 0 in terminal states: V(s_n) of an episode that ended with EOS.
`bonuses` are what a soft return pays for each token, beta l_t; zero where values are not entropy-regularised.
`continues` (B, T) says after which tokens the return goes on to the next token's target; elsewhere it takes V alone.
"""

import torch
from torch import Tensor


def one_step_targets(rewards: Tensor, values: Tensor, gamma: float) -> Tensor:
    """y_t = r_t + gamma V(s_{t+1}); with V = max_a Q this is Q-learning (Mnih et al. 2015).

    rewards (B, T), values (B, T + 1) -> (B, T).
    """
    return rewards + gamma * values[:, 1:]


def continuing(mask: Tensor, greedy: Tensor | None = None) -> Tensor:
    """All tokens but each response's last; given which tokens are greedy, only before those (Watkins 1989).

    mask (B, T) bool, greedy (B, T) bool -> (B, T) bool.
    """
    goes_on = mask if greedy is None else mask & greedy
    return torch.nn.functional.pad(goes_on, (0, 1))[:, 1:]


def lambda_targets(
    rewards: Tensor, values: Tensor, bonuses: Tensor, continues: Tensor, gamma: float, trace: float
) -> Tensor:
    """TD(lambda): y_t = r_t + gamma {(1 - lambda) V(s_{t+1}) + lambda [y_{t+1} - b_{t+1}]}, V alone where it is cut.

    The last token's target bootstraps from V(s_n) alone: zero after EOS, the value after a truncated response.
    Soft values: entropy-regularised with respect to the reference policy, as in path consistency learning (Nachum et
    al. 2017) and Q(lambda) of soft Q-learning (Haarnoja et al. 2017; Schulman et al. 2017, eq. 24). Hard values, cut
    at tokens that are not greedy: Watkins' Q(lambda).

    rewards, bonuses, continues (B, T); values (B, T + 1) -> (B, T).
    """
    targets = one_step_targets(rewards, values, gamma)
    for t in reversed(range(rewards.shape[1] - 1)):
        returned = targets[:, t + 1] - bonuses[:, t + 1]
        mixed = (1 - trace) * values[:, t + 1] + trace * returned
        targets[:, t] = rewards[:, t] + gamma * torch.where(continues[:, t], mixed, values[:, t + 1])
    return targets


def n_step_targets(
    rewards: Tensor, values: Tensor, bonuses: Tensor, continues: Tensor, gamma: float, steps: int
) -> Tensor:
    """y_t = r_t + sum_{0<k<n} gamma^k (r_{t+k} - b_{t+k}) + gamma^n V(s_{t+n}), V sooner where it is cut.

    rewards, bonuses, continues (B, T); values (B, T + 1) -> (B, T).
    """
    targets = one_step_targets(rewards, values, gamma)
    for _ in range(min(steps, rewards.shape[1]) - 1):
        returned = torch.nn.functional.pad(targets - bonuses, (0, 1))[:, 1:]
        targets = rewards + gamma * torch.where(continues, returned, values[:, 1:])
    return targets


def discounts(length: int, gamma: float, like: Tensor) -> Tensor:
    """(length,) gamma^t for t = 0 .. length - 1."""
    return gamma ** torch.arange(length, device=like.device, dtype=like.dtype)


def group_values(returns: Tensor, groups: Tensor) -> Tensor:
    """V(s_1) in closed form: for each episode the mean over its group of what the path left unexplained.

    `returns` is R - beta sum_t l_t; at the optimum it is the same for every response to a prompt and equals the
    soft value of the prompt. returns (B,), groups (B,) -> (B,), without gradient.
    """
    same = (groups[:, None] == groups[None, :]).to(returns.dtype)  # (B, B)
    return (same @ returns.detach()) / same.sum(1)


def importance_weights(log_probs: Tensor, behaviour: Tensor, mask: Tensor, of: str, clip: float) -> Tensor:
    """min(clip, pi / mu): of each `token`, or of the whole `episode` at each of its tokens (Precup et al. 2000).

    log_probs and behaviour log-probabilities in nats, mask (B, T) -> (B, T), without gradient.
    """
    log_weights = (log_probs - behaviour).detach() * mask
    if of == "episode":
        log_weights = log_weights.sum(1, keepdim=True).expand(mask.shape)
    return log_weights.exp().clamp(max=clip)
