"""Targets and losses against numbers worked by hand."""

import pytest
import torch
from torch import Tensor

from lmdqn.learn.losses import path_residuals, quantile_loss, residual_loss
from lmdqn.learn.targets import (
    continuing,
    discounts,
    group_values,
    importance_weights,
    lambda_targets,
    n_step_targets,
    one_step_targets,
)


def close(found: Tensor, wanted: Tensor | list[float] | list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.as_tensor(wanted), rtol=1e-5, atol=1e-6)


# --- one step -----------------------------------------------------------------------------------------------------


def test_one_step_targets() -> None:
    rewards = torch.tensor([[0.0, 0.5, 1.0], [2.0, 0.0, 0.0]])
    values = torch.tensor([[9.0, 0.2, 0.4, 0.0], [9.0, 3.0, 0.0, 0.0]])
    close(one_step_targets(rewards, values, gamma=0.5), [[0.1, 0.7, 1.0], [3.5, 0.0, 0.0]])


# --- soft TD(lambda) ----------------------------------------------------------------------------------------------

# Episode 0 has three tokens and ended: V(s_3) = 0. Episode 1 has two and was cut off: V(s_2) = 0.8 is bootstrapped.
# What stands on padding, and V(s_0), must not matter.
REWARDS = torch.tensor([[0.0, 0.25, 1.0], [0.0, 0.5, 50.0]])
VALUES = torch.tensor([[70.0, 0.2, 0.4, 0.0], [80.0, 0.6, 0.8, 90.0]])
LOG_RATIOS = torch.tensor([[60.0, 0.1, 0.2], [60.0, 0.4, 40.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
BETA = 0.5


@pytest.mark.parametrize(
    ("trace", "gamma", "wanted"),
    [
        # lambda = 0 is one step: 0 + V(s_1), 0.25 + V(s_2), 1 + 0; and 0 + 0.6, 0.5 + 0.8.
        (0.0, 1.0, [[0.2, 0.65, 1.0], [0.6, 1.3, 0.0]]),
        # lambda = 1: y_2 = 1; y_1 = 0.25 + (1 - 0.5 * 0.2) = 1.15; y_0 = 1.15 - 0.5 * 0.1 = 1.1.
        # Cut off: y_1 = 0.5 + 0.8 = 1.3; y_0 = 1.3 - 0.5 * 0.4 = 1.1.
        (1.0, 1.0, [[1.1, 1.15, 1.0], [1.1, 1.3, 0.0]]),
        # lambda = 0.5: y_2 = 1; y_1 = 0.25 + 0.5 * 0.4 + 0.5 * (1 - 0.1) = 0.9; y_0 = 0.5 * 0.2 + 0.5 * (0.9 - 0.05)
        # = 0.525. Cut off: y_1 = 1.3; y_0 = 0.5 * 0.6 + 0.5 * (1.3 - 0.2) = 0.85.
        (0.5, 1.0, [[0.525, 0.9, 1.0], [0.85, 1.3, 0.0]]),
        # lambda = 0.5, gamma = 0.5: y_2 = 1; y_1 = 0.25 + 0.5 * (0.2 + 0.45) = 0.575;
        # y_0 = 0.5 * (0.1 + 0.5 * (0.575 - 0.05)) = 0.18125.
        # Cut off: y_1 = 0.5 + 0.5 * 0.8 = 0.9; y_0 = 0.5 * (0.3 + 0.5 * (0.9 - 0.2)) = 0.325.
        (0.5, 0.5, [[0.18125, 0.575, 1.0], [0.325, 0.9, 0.0]]),
    ],
)
def test_lambda_targets_of_a_padded_batch(trace: float, gamma: float, wanted: list[list[float]]) -> None:
    found = lambda_targets(REWARDS, VALUES, BETA * LOG_RATIOS, continuing(MASK), gamma, trace)
    close(found * MASK, wanted)


def test_an_episode_has_the_same_targets_alone() -> None:
    together = lambda_targets(REWARDS, VALUES, BETA * LOG_RATIOS, continuing(MASK), 0.9, 0.7)
    bonuses = BETA * LOG_RATIOS[1:, :2]
    alone = lambda_targets(REWARDS[1:, :2], VALUES[1:, :3], bonuses, continuing(MASK[1:, :2]), 0.9, 0.7)
    close(together[1:, :2], alone)


def test_the_whole_return_of_a_terminal_episode_is_reward_less_the_later_log_ratios() -> None:
    """lambda = gamma = 1: y_t = R - beta (l_{t+1} + ... + l_{n-1}), whatever V says."""
    generator = torch.Generator().manual_seed(0)
    log_ratios = torch.randn(4, 7, generator=generator)
    values = torch.randn(4, 8, generator=generator)
    values[:, -1] = 0
    rewards = torch.zeros(4, 7)
    rewards[:, -1] = torch.randn(4, generator=generator)
    later = torch.stack([log_ratios[:, t + 1 :].sum(1) for t in range(7)], dim=1)
    continues = continuing(torch.ones(4, 7, dtype=torch.bool))
    found = lambda_targets(rewards, values, 0.1 * log_ratios, continues, 1.0, 1.0)
    close(found, rewards[:, -1:] - 0.1 * later)


def test_lambda_zero_is_one_step() -> None:
    generator = torch.Generator().manual_seed(1)
    rewards, log_ratios = torch.randn(2, 3, 5, generator=generator)
    values = torch.randn(3, 6, generator=generator)
    continues = continuing(torch.ones(3, 5, dtype=torch.bool))
    found = lambda_targets(rewards, values, 0.1 * log_ratios, continues, 0.8, 0.0)
    close(found, one_step_targets(rewards, values, 0.8))


# --- path consistency ---------------------------------------------------------------------------------------------


def test_group_values_are_means_over_groups() -> None:
    returns = torch.tensor([1.0, 5.0, 3.0, 8.0], requires_grad=True)
    values = group_values(returns, torch.tensor([4, 7, 4, 7]))
    close(values, [2.0, 6.5, 2.0, 6.5])
    assert not values.requires_grad


def test_path_residuals() -> None:
    """(2 - 1) / 0.5 + 0.5 + 0.25 = 2.75; cut off, V(s_n) = 0.25: (0 - 0.5 - 0.5 - 0.25) / 0.5 - 1 = -3.5."""
    found = path_residuals(
        first_values=torch.tensor([2.0, 0.0]),
        last_values=torch.tensor([0.0, 0.25]),
        log_ratios=torch.tensor([[0.5, 0.25, 0.0], [-1.0, 0.5, -0.5]]),
        rewards=torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.5, 0.5]]),
        discounts=discounts(3, 1.0, torch.zeros(1)),
        beta=0.5,
    )
    close(found, [2.75, -3.5])


def test_discounted_path_residual() -> None:
    """gamma 0.5: (1 - (0.5 * 0.5 + 0.25 * 1)) / 0.5 + (1 + 0.5 * 2 + 0.25 * 4) = 1 + 3."""
    gammas = discounts(3, 0.5, torch.zeros(1))
    close(gammas, [1.0, 0.5, 0.25])
    ratios, rewards = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.5, 1.0]])
    close(path_residuals(torch.tensor([1.0]), torch.zeros(1), ratios, rewards, gammas, 0.5), [4.0])


def test_before_learning_a_path_residual_is_the_reward_in_nats() -> None:
    """The policy is still the reference and V is 0: exactly -R / beta."""
    rewards = torch.tensor([[0.0, 0.0, 0.375], [0.0, -0.25, 0.0]])
    found = path_residuals(torch.zeros(2), torch.zeros(2), torch.zeros(2, 3), rewards, torch.ones(3), beta=0.0625)
    assert found.tolist() == [-6.0, 4.0]


def test_path_residuals_vanish_at_the_soft_optimum() -> None:
    """Two one-token responses with pi proportional to pi_0 exp(r / beta), and V = beta log sum pi_0 exp(r / beta)."""
    beta, rewards, reference = 0.5, torch.tensor([1.0, 0.2]), torch.tensor([0.3, 0.7])
    weights = reference * torch.exp(rewards / beta)
    log_ratios = (weights / weights.sum() / reference).log()[:, None]
    value = (beta * weights.sum().log()).expand(2)
    found = path_residuals(value, torch.zeros(2), log_ratios, rewards[:, None], torch.ones(1), beta)
    close(found, [0.0, 0.0])
    close(group_values(rewards - beta * log_ratios[:, 0], torch.tensor([0, 0])), value)


# --- n steps, cuts, weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (1, [[0.2, 0.65, 1.0], [0.6, 1.3, 0.0]]),
        # y_0 = 0 + (0.25 + V(s_2) - 0.5 * 0.1) = 0.6; y_1 = 0.25 + (1 - 0.5 * 0.2) = 1.15, the end comes first.
        # Cut off: y_0 = (0.5 + 0.8) - 0.5 * 0.4 = 1.1; y_1 = 0.5 + 0.8.
        (2, [[0.6, 1.15, 1.0], [1.1, 1.3, 0.0]]),
        # As many steps as there are: the whole return, as with lambda = 1.
        (3, [[1.1, 1.15, 1.0], [1.1, 1.3, 0.0]]),
        (50, [[1.1, 1.15, 1.0], [1.1, 1.3, 0.0]]),
    ],
)
def test_n_step_targets_of_a_padded_batch(steps: int, wanted: list[list[float]]) -> None:
    found = n_step_targets(REWARDS, VALUES, BETA * LOG_RATIOS, continuing(MASK), 1.0, steps)
    close(found * MASK, wanted)


def test_two_discounted_steps() -> None:
    """gamma 0.5: y_0 = 0.5 * (0.25 + 0.5 * 0.4 - 0.05) = 0.2; y_1 = 0.25 + 0.5 * (1 - 0.1) = 0.7."""
    found = n_step_targets(REWARDS, VALUES, BETA * LOG_RATIOS, continuing(MASK), 0.5, 2)
    close(found[0], [0.2, 0.7, 1.0])


def test_a_return_is_cut_before_a_token_that_is_not_greedy() -> None:
    """Watkins: token 2 of episode 0 is not greedy, so y_1 takes V(s_2) and y_0 (token 1 is) goes on to y_1."""
    greedy = torch.tensor([[False, True, False], [True, True, True]])
    continues = continuing(MASK, greedy)
    assert continues.tolist() == [[True, False, False], [True, False, False]]
    none = torch.zeros_like(REWARDS)
    wanted = torch.tensor([[0.65, 0.65, 1.0], [1.3, 1.3, 0.0]])
    close(lambda_targets(REWARDS, VALUES, none, continues, 1.0, 1.0) * MASK, wanted)
    close(n_step_targets(REWARDS, VALUES, none, continues, 1.0, 3) * MASK, wanted)


def test_importance_weights_of_tokens_and_episodes() -> None:
    """pi/mu of 2, 0.5 and (on padding) 9; of 2 and 4: products 1 and 8, cut at 3."""
    log_probs = torch.tensor([[2.0, 0.5, 9.0], [2.0, 4.0, 1.0]]).log()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    none = torch.zeros_like(log_probs)
    close(importance_weights(log_probs, none, mask, "token", 3.0), [[2.0, 0.5, 1.0], [2.0, 3.0, 1.0]])
    close(importance_weights(log_probs, none, mask, "episode", 3.0), [[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]])


# --- losses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residual", "huber_delta", "loss"),
    [
        (3.0, None, 4.5),
        (-3.0, None, 4.5),
        (1.5, 2.0, 1.125),
        (2.0, 2.0, 2.0),
        (-2.0, 2.0, 2.0),
        (3.0, 2.0, 4.0),  # 2 * (3 - 1)
        (-3.0, 2.0, 4.0),
        (0.5, 0.25, 0.09375),  # 0.25 * (0.5 - 0.125)
    ],
)
def test_residual_loss_of_one(residual: float, huber_delta: float | None, loss: float) -> None:
    assert residual_loss(torch.tensor([residual]), torch.tensor([True]), huber_delta).item() == loss


@pytest.mark.parametrize(("huber_delta", "loss"), [(None, 0.125 + 0.5 + 4.5), (1.0, 0.125 + 0.5 + 2.5)])
def test_residual_loss_is_summed_and_leaves_padding_out(huber_delta: float | None, loss: float) -> None:
    residuals = torch.tensor([[0.5, -1.0], [3.0, 100.0]])
    mask = torch.tensor([[True, True], [True, False]])
    assert residual_loss(residuals, mask, huber_delta).item() == loss


@pytest.mark.parametrize(("huber_delta", "slopes"), [(None, [0.5, -1.0, 3.0, 0.0]), (1.0, [0.5, -1.0, 1.0, 0.0])])
def test_slope_of_the_loss_is_the_residual_up_to_delta(huber_delta: float | None, slopes: list[float]) -> None:
    residuals = torch.tensor([0.5, -1.0, 3.0, 100.0], requires_grad=True)
    residual_loss(residuals, torch.tensor([True, True, True, False]), huber_delta).backward()
    assert residuals.grad is not None
    assert residuals.grad.tolist() == slopes


def test_residuals_are_weighed() -> None:
    residuals, weights = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.5, 0.0])
    assert residual_loss(residuals, weights, None).item() == 0.5 + 1.0
    assert residual_loss(residuals, weights, 1.0).item() == 0.5 + 0.75


def test_quantile_loss_by_hand() -> None:
    """Levels .25 and .75 at 0 and 2, sample 1, kappa 1: (.25 * .5 + .25 * .5) / 2; at weight 3 thrice that."""
    quantiles = torch.tensor([[0.0, 2.0]])
    assert quantile_loss(quantiles, torch.tensor([1.0]), torch.tensor([1.0])).item() == 0.125
    assert quantile_loss(quantiles, torch.tensor([1.0]), torch.tensor([3.0])).item() == 0.375
    # sample 4: errors 4 and 2, both above: (.25 * 3.5 + .75 * 1.5) / 2
    assert quantile_loss(quantiles, torch.tensor([4.0]), torch.tensor([1.0])).item() == 1.0


def test_learnt_quantiles_are_those_of_the_samples() -> None:
    """Eight equally likely returns: the median of the lower and of the upper half are at levels .25 and .75."""
    samples = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0])
    quantiles = torch.nn.Parameter(torch.zeros(1, 2))
    optimiser = torch.optim.Adam([quantiles], lr=0.05)
    for _ in range(600):
        loss = quantile_loss(quantiles.expand(8, 2), samples, torch.ones(8), kappa=0.01)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    low, high = quantiles[0].tolist()
    assert 1.0 <= low <= 2.0
    assert 11.0 <= high <= 12.0
