"""The behaviour policy: its bounds by the reference, and its course over the steps."""

import math

import pytest
import torch

from lmdqn.model.exploration import Exploration, exploration_at
from lmdqn.recipe import RolloutSection

LOGITS = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
REFERENCE = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()


def test_the_references_top_k_by_hand() -> None:
    """Its two likeliest tokens are 0 and 2: softmax of 1 and 3 between them."""
    probabilities = Exploration(reference_top_k=2).log_probs(LOGITS, REFERENCE).exp()
    share = 1 / (1 + math.exp(2))
    torch.testing.assert_close(probabilities, torch.tensor([[share, 0.0, 1 - share, 0.0]]))


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.1, [0]), (0.4, [0]), (0.5, [0, 2]), (0.71, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_the_references_top_p_is_the_fewest_tokens_that_reach_it(top_p: float, allowed: list[int]) -> None:
    log_probs = Exploration(reference_top_p=top_p).log_probs(LOGITS, REFERENCE)
    assert log_probs.isfinite()[0].nonzero().flatten().tolist() == allowed
    assert float(log_probs.exp().sum()) == pytest.approx(1.0)


def test_top_p_counts_inside_top_k() -> None:
    """Of the reference's two likeliest, .4 and .3, the first alone is 4/7."""
    log_probs = Exploration(reference_top_k=2, reference_top_p=0.55).log_probs(LOGITS, REFERENCE)
    assert log_probs.isfinite()[0].tolist() == [True, False, False, False]


def test_epsilon_greedy_inside_the_references_top_k() -> None:
    """Allowed 0 and 2, the better of which is 2: epsilon .4 gives .2 and .8."""
    probabilities = Exploration(reference_top_k=2, epsilon=0.4).log_probs(LOGITS, REFERENCE).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.2, 0.0, 0.8, 0.0]]))


def test_temperature_by_hand() -> None:
    torch.testing.assert_close(Exploration(temperature=2.0).log_probs(LOGITS), (LOGITS / 2).log_softmax(-1))


def test_sharpness_goes_from_the_reference_to_the_policy_and_on() -> None:
    """pi_b ~ pi_0^(1 - c) pi^c: the offsets of either's logits change nothing."""
    for sharpness, expected in ((0.0, REFERENCE), (1.0, LOGITS), (1.5, 1.5 * LOGITS - 0.5 * REFERENCE)):
        found = Exploration(sharpness=sharpness).log_probs(LOGITS + 7, REFERENCE - 3)
        torch.testing.assert_close(found, expected.log_softmax(-1))


@pytest.mark.parametrize(
    ("decay", "step", "epsilon"),
    [
        ("linear", 0, 0.9),
        ("linear", 5, 0.5),
        ("linear", 10, 0.1),
        ("linear", 99, 0.1),
        ("exponential", 0, 0.9),
        ("exponential", 10, 0.1 + 0.8 / math.e),
        ("exponential", 20, 0.1 + 0.8 / math.e**2),
    ],
)
def test_the_course_of_epsilon(decay: str, step: int, epsilon: float) -> None:
    rollout = RolloutSection(
        epsilon_greedy=True, epsilon_start=0.9, epsilon_end=0.1, epsilon_decay_steps=10, epsilon_decay=decay
    )
    assert exploration_at(rollout, step).epsilon == pytest.approx(epsilon)


def test_boltzmann_has_no_epsilon() -> None:
    assert exploration_at(RolloutSection(temperature=0.7), 3) == Exploration(temperature=0.7)
