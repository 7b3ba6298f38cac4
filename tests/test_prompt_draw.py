"""Which prompts a rollout draws."""

import torch

from lmdqn.learn.prompt_draw import length_weights


def test_every_length_is_as_likely_as_any_other() -> None:
    weights = length_weights(torch.tensor([10, 10, 10, 10, 20, 20, 30]))
    torch.testing.assert_close(weights, torch.tensor([1 / 4] * 4 + [1 / 2] * 2 + [1.0], dtype=torch.float64))


def test_lengths_within_a_tenth_of_the_span_count_as_one() -> None:
    weights = length_weights(torch.tensor([100, 101, 200]))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64))


def test_prompts_of_one_length_weigh_the_same() -> None:
    assert length_weights(torch.tensor([7, 7, 7])).unique().numel() == 1


def test_a_single_outlier_is_not_drawn_all_the_time() -> None:
    weights = length_weights(torch.tensor([10] * 999 + [5000]))
    before_the_cap = (999 * (1 / 999) + 1) / 1000  # mean of the weights of two bins that weigh 1 each
    assert float(weights[-1]) == 8 * before_the_cap
    assert float(weights[-1] / weights.sum()) < 0.02
