"""The Jensen-Shannon bound on a behaviour policy, against divergences worked out in full."""

import math

import pytest
import torch
from torch import Tensor

from lmdqn.episodes import make_batch
from lmdqn.learn.behaviour import GRID, SHARPEST, fit_sharpness, js_divergence, mixed_log_probs
from tests.text_world import LAYOUT, World, networks_of, world_recipe

WORLD = World()


def exact_js(p: Tensor, q: Tensor) -> float:
    middle = (p + q) / 2
    return float(0.5 * (p * (p / middle).log()).sum() + 0.5 * (q * (q / middle).log()).sum())


def test_divergence_from_samples_is_the_exact_one_in_expectation() -> None:
    """All tokens of one state, each as often as mu has it: 60, 30 and 10 of a hundred."""
    mu, policy = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    tokens = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    found = js_divergence((policy / mu).log()[tokens][:, None])
    assert float(found) == pytest.approx(exact_js(mu, policy), abs=1e-6)


def test_divergence_is_zero_for_equal_and_log_2_for_disjoint_policies() -> None:
    assert float(js_divergence(torch.zeros(5, 1))) == 0.0
    assert float(js_divergence(torch.full((5, 1), -40.0))) == pytest.approx(0.5 * math.log(2), abs=1e-6)  # mu's half


def test_mixtures_go_from_the_reference_to_the_policy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 3, 5, generator=generator)
    tokens = torch.tensor([0, 3, 4])
    found = mixed_log_probs(logits, reference, tokens, [0.0, 0.5, 1.0])
    for column, mixed in enumerate((reference, (reference.log_softmax(-1) + logits.log_softmax(-1)) / 2, logits)):
        torch.testing.assert_close(found[:, column], mixed.log_softmax(-1)[torch.arange(3), tokens])


def test_the_sharpest_policy_within_the_bound() -> None:
    """Rises with the bound; keeps it; the next step of the grid would not."""
    generator = torch.Generator().manual_seed(2)
    start = WORLD.reference + 2 * torch.randn(WORLD.reference.shape, generator=generator)
    networks = networks_of(WORLD, world_recipe(1), start)
    episodes = [WORLD.episode(ids) for ids in WORLD.responses]
    batch = make_batch(episodes, LAYOUT)
    found = [fit_sharpness(networks, [batch], bound) for bound in (1e-6, 0.01, 0.05, 0.6)]
    sharpness = [c for c, _ in found]
    assert sharpness[0] == 0.0
    assert 0.0 < sharpness[1] < sharpness[2] < sharpness[3] == SHARPEST
    assert 0.005 < found[1][1] <= 0.01
    beyond = sharpness[2] + SHARPEST / GRID
    ratios = mixed_log_probs(networks.online(batch).logits, networks.reference(batch).logits, batch.actions, [beyond])
    ratios = ratios[batch.acting] - batch.behaviour_log_probs[batch.response_mask][:, None]
    assert float(js_divergence(ratios)) > 0.05
