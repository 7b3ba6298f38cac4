"""What must hold of the losses on a real network: offsets change nothing, step 0 is known, gradients go one way."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmdqn.episodes import Batch, Episode, Example, SequenceFormat, make_batch
from lmdqn.learn.objective import Learnt, loss_terms
from lmdqn.learn.objective import q_loss as loss_of_networks
from lmdqn.learn.step_record import rollout_record
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import StateOutputs
from lmdqn.model.vocabulary import log_prob_of
from lmdqn.recipe import QLearningSection
from lmdqn.text.rewards import centre

BETA = 0.5
SPREAD = 0.2  # of returns
LAYOUT = SequenceFormat(pad_id=0, eos_ids=(1,), decoder_prefix=None, context_tokens=None)
DUELING = QLearningSection(beta=BETA, trace=0.7)
PATH = QLearningSection(beta=BETA, loss="path")
CLASSIC = QLearningSection(beta=BETA, form="classic")


class FakeNetwork(nn.Module):
    """Given logits (N, V) and values (N,) for the states of one batch, with an optional offset c(s)."""

    value_head = SimpleNamespace(scale=torch.tensor(SPREAD))

    def __init__(self, states: int, seed: int, offset: float = 0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = nn.Parameter(torch.randn(states, 7, generator=generator))
        self.values = nn.Parameter(torch.randn(states, generator=generator))
        self.offset = offset * torch.randn(states, 1, generator=generator)

    def forward(self, batch: Batch) -> StateOutputs:
        return StateOutputs(self.logits + self.offset, self.values, hidden=torch.zeros(len(self.values), 1))

    def values_of(self, batch: Batch, hidden: torch.Tensor) -> torch.Tensor:
        return self.values


def q_loss(batch: Batch, online: Any, target: Any, recipe: QLearningSection, reference: Any = None) -> Learnt:
    """The loss with these networks; sampling the policy itself is what explores."""
    networks = Networks(online, target, target if reference is None else reference)
    return loss_of_networks(batch, networks, recipe, Exploration())


def two_groups() -> Batch:
    """Two groups of two; the second episode is truncated. Rewards are centred by hand below."""
    example = Example("", ("",), (5, 6), (), "")
    episodes = [
        Episode(example, [2, 3, 1], False, 0),
        Episode(example, [4, 2], True, 0),
        Episode(example, [1], False, 1),
        Episode(example, [3, 3, 2, 1], False, 1),
    ]
    for i, episode in enumerate(episodes):
        episode.reward, episode.baseline = [0.9, 0.3, 0.0, 0.4][i], [0.6, 0.6, 0.2, 0.2][i]
        episode.reference_log_probs = torch.full((len(episode.response_ids),), -1.5)
    return make_batch(episodes, LAYOUT)


def fake(batch: Batch, seed: int, offset: float = 0.0) -> Any:
    """Stands in for a QNetwork."""
    return FakeNetwork(int(batch.state_mask.sum()), seed, offset)


@pytest.mark.parametrize("recipe", [DUELING, PATH])
def test_an_offset_of_each_states_logits_changes_no_loss(recipe: QLearningSection) -> None:
    batch = two_groups()
    plain = q_loss(batch, fake(batch, 1), fake(batch, 2), recipe)
    shifted = q_loss(batch, fake(batch, 1, offset=30.0), fake(batch, 2, offset=30.0), recipe)
    torch.testing.assert_close(plain.loss, shifted.loss, rtol=1e-4, atol=1e-4)


def test_the_classic_form_does_depend_on_offsets() -> None:
    """The trap: so the test above can fail."""
    batch = two_groups()
    plain = q_loss(batch, fake(batch, 1), fake(batch, 2), CLASSIC)
    shifted = q_loss(batch, fake(batch, 1, offset=30.0), fake(batch, 2, offset=30.0), CLASSIC)
    assert (plain.loss - shifted.loss).abs().item() > 1.0


def at_the_start(batch: Batch) -> tuple[Any, Batch]:
    """A network with V = 0, and the batch as that network's own reference sees it."""
    network = fake(batch, 1)
    network.values.data.zero_()
    log_probs = network(batch).logits.log_softmax(-1).gather(1, batch.actions[:, None]).squeeze(1)
    return network, replace(batch, reference_log_probs=batch.at_tokens(log_probs).detach())


def test_at_step_0_the_path_residual_is_group_mean_minus_reward_over_beta() -> None:
    """With all log-ratios zero the closed-form V(s_1) is the group's mean reward."""
    batch = two_groups()
    network, batch = at_the_start(batch)
    learnt = q_loss(batch, network, network, PATH)
    expected = -torch.tensor([0.9 - 0.6, 0.3 - 0.6, 0.0 - 0.2, 0.4 - 0.2]) / BETA
    torch.testing.assert_close(learnt.residuals[:, 0], expected)


def test_at_step_0_the_dueling_residual_is_minus_the_discounted_reward_over_beta() -> None:
    """Lambda 1, V = 0 and pi = pi_0: every token of an episode has the residual -(R - b) / beta."""
    batch = two_groups()
    network, batch = at_the_start(batch)
    learnt = q_loss(batch, network, network, QLearningSection(beta=BETA, trace=1.0))
    centred = batch.rewards.sum(1, keepdim=True)
    torch.testing.assert_close(learnt.residuals, -centred / BETA * batch.response_mask)


@pytest.mark.parametrize(
    ("settings", "of_q", "of_values"),
    [
        ({"trace": 0.5}, 0.5, 1.0),
        ({"trace": 0.5, "value_trace": 0.8}, 0.5, 0.8),
        ({"trace": 0.5, "backup": "expected"}, 0.5, 0.5),
    ],
)
def test_q_and_the_value_head_learn_by_traces_of_their_own(
    settings: dict[str, Any], of_q: float, of_values: float
) -> None:
    """One response of two tokens and the reward R: y_2 = R, y_1 = (1 - lambda) Vbar(s_2) + lambda (R - b_2).

    V is a constant of Q's residual, and its own loss is half the squared (V - (y - beta l)) / spread.
    """
    recipe = QLearningSection(beta=BETA, **settings)
    episode = Episode(Example("", ("",), (5,), (), ""), [3, 1], False, 0, reward=0.25)
    episode.reference_log_probs = torch.tensor([-1.0, -2.0])
    batch = make_batch([episode], LAYOUT)
    online, target = fake(batch, 3), fake(batch, 4)
    log_probs = online(batch).logits.log_softmax(-1).detach()
    nats = torch.stack([log_probs[0, 3] + 1, log_probs[1, 1] + 2])
    bonus = BETA * nats[1] if recipe.is_soft else torch.zeros(())

    def targets(trace: float) -> Tensor:
        """The target network is the reference here, so that Qbar = Vbar."""
        return torch.stack([(1 - trace) * target.values[1] + trace * (0.25 - bonus), torch.tensor(0.25)]).detach()

    learnt = q_loss(batch, online, target, recipe)
    values = online.values.detach()
    residuals = (values - targets(of_q)) / BETA + nats
    torch.testing.assert_close(learnt.residuals[0], residuals)
    errors = (values - (targets(of_values) - BETA * nats)) / SPREAD
    torch.testing.assert_close(learnt.loss.detach(), (residuals.square().sum() + errors.square().sum()) / 2)
    learnt.loss.backward()
    torch.testing.assert_close(online.values.grad, errors / SPREAD)


def test_the_value_of_a_path_learns_what_the_path_leaves() -> None:
    """V(s_1) against R - beta sum_t l_t, in units of the returns' spread; the path residual moves the policy alone."""
    recipe = PATH.model_copy(update={"path_value": "network"})
    batch = two_groups()
    online, target = fake(batch, 1), fake(batch, 2)
    learnt = q_loss(batch, online, target, recipe)
    learnt.loss.backward()
    first = batch.state_mask.cumsum(1).sub(1)[:, 0] + torch.tensor([0, *batch.state_mask.sum(1).cumsum(0)[:-1]])
    assert online.values.grad.nonzero().flatten().tolist() == first.tolist()
    errors = learnt.residuals[:, 0] * BETA / SPREAD
    torch.testing.assert_close(online.values.grad[first], errors / SPREAD)


@pytest.mark.parametrize("recipe", [QLearningSection(beta=BETA, trace=1.0), PATH])
def test_a_group_of_equal_rewards_gives_no_signal(recipe: QLearningSection) -> None:
    """At the start: rewards .7 and .7, then .2 and .6, whose residuals are (.4 - .2) / .5 and (.4 - .6) / .5."""
    example = Example("", ("",), (5, 6), (), "")
    groups = [[Episode(example, [token, 1], False, group) for token in (2, 3)] for group in (0, 1)]
    for group, rewards in zip(groups, ((0.7, 0.7), (0.2, 0.6)), strict=True):
        for episode, reward in zip(group, rewards, strict=True):
            episode.reward, episode.reference_log_probs = reward, torch.full((2,), -1.5)
            episode.behaviour_log_probs = episode.reference_log_probs
        centre(group, 0.0, recipe)
    network, batch = at_the_start(make_batch([*groups[0], *groups[1]], LAYOUT))
    learnt = q_loss(batch, network, network, recipe)
    torch.testing.assert_close(learnt.residuals[:, 0], torch.tensor([0.0, 0.0, 0.4, -0.4]), atol=1e-6, rtol=0)
    learnt.loss.backward()
    moved = network.logits.grad.abs().sum(1).view(4, 2).sum(1) > 1e-5
    assert moved.tolist() == [False, False, True, True]
    assert rollout_record(groups)["equal_groups_share"] == 0.5


def test_the_classic_residual_by_hand() -> None:
    """One-token episode: Q(s, a) - R. Two tokens: Q(s_1, a_1) - max Qbar(s_2), then Q(s_2, a_2) - R."""
    example = Example("", ("",), (5,), (), "")
    episodes = [Episode(example, [3, 1], False, 0)]
    episodes[0].reward = 0.25
    batch = make_batch(episodes, LAYOUT)
    online, target = fake(batch, 3), fake(batch, 4)
    learnt = q_loss(batch, online, target, CLASSIC)
    q, q_bar = online(batch).logits, target(batch).logits
    expected = torch.stack([q[0, 3] - q_bar[1].max(), q[1, 1] - 0.25])[None]
    torch.testing.assert_close(learnt.residuals, expected.detach())


@pytest.mark.parametrize("recipe", [DUELING, PATH, CLASSIC])
def test_the_gradient_reaches_the_online_network_alone(recipe: QLearningSection) -> None:
    batch = two_groups()
    online, target = fake(batch, 1), fake(batch, 2)
    q_loss(batch, online, target, recipe).loss.backward()
    assert online.logits.grad.abs().sum() > 0
    assert target.logits.grad is None
    assert target.values.grad is None


@pytest.mark.parametrize("recipe", [DUELING, PATH, CLASSIC])
def test_micro_batches_of_whole_groups_add_up(recipe: QLearningSection) -> None:
    """The loss of the batch is the sum of its groups' losses, and so are the numbers of residuals."""
    whole = two_groups()
    online, target = fake(whole, 1), fake(whole, 2)
    total = q_loss(whole, online, target, recipe)
    parts = [_rows(whole, slice(0, 2)), _rows(whole, slice(2, 4))]
    states = [int(part.state_mask.sum()) for part in parts]
    losses = []
    for part, span in zip(parts, (slice(0, states[0]), slice(states[0], sum(states))), strict=True):
        sliced = [fake(part, 0), fake(part, 0)]
        for piece, full in zip(sliced, (online, target), strict=True):
            piece.logits.data = full.logits.data[span]
            piece.values.data = full.values.data[span]
        losses.append(q_loss(part, sliced[0], sliced[1], recipe).loss)
    torch.testing.assert_close(total.loss, torch.stack(losses).sum())
    assert loss_terms(whole, recipe) == sum(loss_terms(part, recipe) for part in parts)


def _rows(batch: Batch, rows: slice) -> Batch:
    def cut(name: str) -> Tensor:
        return getattr(batch, name)[rows]

    names = ("response_ids", "response_mask", "state_mask", "rewards", "reference_log_probs", "groups", "weights")
    return replace(batch, **{name: cut(name) for name in names})


@pytest.mark.parametrize("recipe", [DUELING, PATH, CLASSIC])
def test_supervised_demonstrations_are_learnt_by_cross_entropy_alone(recipe: QLearningSection) -> None:
    """The loss is that of the samples plus w times the cross-entropy, up to a constant of the reference."""
    batch, weight = two_groups(), 3.0
    taught = torch.tensor([False, False, False, True])
    unweighted = replace(batch, weights=(~taught).float())
    network, target = fake(batch, 1), fake(batch, 2)
    of_samples = q_loss(unweighted, network, target, recipe).loss
    both = replace(batch, demonstrations=taught)
    together = q_loss(both, network, target, recipe.model_copy(update={"supervised": weight})).loss
    log_probs = batch.at_tokens(network(batch).over_vocabulary(log_prob_of, batch.actions))[3]
    cross_entropy = -log_probs.sum() + (0.0 if recipe is CLASSIC else batch.reference_log_probs[3].sum())
    torch.testing.assert_close(together - of_samples, weight * cross_entropy)
