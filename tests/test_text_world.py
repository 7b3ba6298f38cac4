"""Every part against an exact oracle: what converges in theory reaches the optimum, and what does not, misses.

All learning goes through the trainer, the objective and the networks of a real run; only the model is a table.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lmdqn.episodes import make_batch
from lmdqn.learn.objective import q_loss
from lmdqn.learn.targets import importance_weights
from lmdqn.model.exploration import Exploration
from lmdqn.recipe import Recipe, RolloutSection
from lmdqn.text.metrics import sentence_bleu
from tests.text_world import (
    EOS,
    LAYOUT,
    World,
    learn,
    learnt_log_policy,
    learnt_q,
    networks_of,
    trainer_of,
    world_recipe,
)

BETA = 0.5
TEMPERATURE = RolloutSection().temperature  # of the behaviour policy that the expected backup takes its mean under
TOLERANCE = 0.01  # reward units; rewards lie between -1 and 1
WORLD = World(vocabulary=4, length=3)
LIVE = WORLD.live()
LOG_PRIOR = WORLD.reference.log_softmax(-1)


def soft(state: int, q: Tensor) -> Tensor:
    return BETA * torch.logsumexp(LOG_PRIOR[state] + q / BETA, 0)


def soft_uniform(state: int, q: Tensor) -> Tensor:
    return BETA * torch.logsumexp(q / BETA, 0)


def hard(state: int, q: Tensor) -> Tensor:
    return q.max()


def hard_in_top_2(state: int, q: Tensor) -> Tensor:
    return q[WORLD.reference[state].topk(2).indices].max()


def of_the_policy(state: int, q: Tensor, temperature: float = 1.0) -> Tensor:
    log_policy = LOG_PRIOR[state] + q / BETA
    return (q * (log_policy / temperature).softmax(0)).sum()


def expected(state: int, q: Tensor) -> Tensor:
    return of_the_policy(state, q, TEMPERATURE)


ORACLES = {"soft": soft, "soft_double": soft, "hard": hard, "double": hard, "expected": expected}


def miss(recipe: Recipe, log: list[tuple[int, ...]], optimum: Tensor, start: Tensor | None = None) -> float:
    """Largest error of the learnt Q over states and actions of the log."""
    trainer = learn(WORLD, recipe, log, start)
    error = (learnt_q(WORLD, trainer) - optimum).abs()
    return max(float(error[s, a]) for ids in log for s, a in WORLD.path(ids))


def qlearning(**settings: Any) -> Recipe:
    return world_recipe(250, qlearning={"target_polyak": 0.3, **settings})


# --- what must converge -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backup", ORACLES)
@pytest.mark.parametrize("form", ["dueling", "calibrated"])
def test_each_form_reaches_the_optimum_of_each_backup(form: str, backup: str) -> None:
    recipe = qlearning(form=form, backup=backup, trace=0.0 if backup == "expected" else 0.95)
    assert miss(recipe, WORLD.responses, WORLD.optimum(ORACLES[backup])) < TOLERANCE


@pytest.mark.parametrize(
    ("backup", "oracle"), [("hard", hard), ("double", hard), ("soft", soft_uniform), ("soft_double", soft_uniform)]
)
def test_the_classic_form_reaches_the_optimum_in_a_table(backup: str, oracle: Any) -> None:
    """Where a table can hold any offset, raw logits will do; the soft value is against the uniform policy."""
    recipe = qlearning(form="classic", backup=backup)
    assert miss(recipe, WORLD.responses, WORLD.optimum(oracle)) < TOLERANCE


COMBINATIONS: dict[str, dict[str, Any]] = {
    "one step": {"trace": 0.0},
    "the whole return": {"trace": 1.0},
    "one step, and of values too": {"trace": 0.0, "value_trace": 0.0},
    "values of shorter traces": {"trace": 1.0, "value_trace": 0.5},
    "two steps": {"n_step": 2},
    "two steps, Watkins": {"n_step": 2, "backup": "hard"},
    "discounted": {"gamma": 0.8},
    "discounted, Double DQN, Watkins": {"gamma": 0.8, "backup": "double"},
    "discounted, calibrated, two steps": {"gamma": 0.8, "form": "calibrated", "n_step": 2},
    "top-k": {"backup": "hard", "backup_top_k": 2},
    "top-k, Double DQN, calibrated": {"backup": "double", "backup_top_k": 2, "form": "calibrated"},
    "Huber": {"huber_delta": 1.0},
    "hard copies": {"target_polyak": None, "target_copy_every": 5},
    "hard copies in 16 bits": {"target_polyak": None, "target_copy_every": 5, "target_dtype": "bfloat16"},
    "Polyak and hard copies": {"target_polyak": 0.1, "target_copy_every": 10},
    "quantiles": {"value_quantiles": 3},
    "a policy gradient beside it": {"actor": 1.0},
    "a policy gradient beside it, calibrated": {"actor": 1.0, "form": "calibrated"},
    "a policy gradient beside it, classic": {"actor": 0.3, "form": "classic", "backup": "soft", "trace": 0.95},
    "importance weights of tokens": {"importance": "token"},
    "importance weights of episodes, soft double": {"importance": "episode", "backup": "soft_double"},
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_reach_their_optimum(name: str) -> None:
    recipe = qlearning(**COMBINATIONS[name])
    settings = recipe.qlearning
    oracle = hard_in_top_2 if settings.backup_top_k else ORACLES[settings.backup]
    if settings.form == "classic":
        oracle = soft_uniform
    assert miss(recipe, WORLD.responses, WORLD.optimum(oracle, settings.gamma)) < TOLERANCE


@pytest.mark.parametrize("form", ["dueling", "calibrated"])
@pytest.mark.parametrize(("path_value", "gamma"), [("group", 1.0), ("network", 0.8)])
def test_path_consistency_reaches_the_soft_optimal_policy(form: str, path_value: str, gamma: float) -> None:
    settings = {"form": form, "loss": "path", "path_value": path_value, "gamma": gamma, "target_polyak": 0.3}
    q = WORLD.optimum(soft, gamma)
    optimal = (LOG_PRIOR + q / BETA).log_softmax(-1)
    trainer = learn(WORLD, world_recipe(300, qlearning=settings), WORLD.responses)
    assert (learnt_log_policy(trainer) - optimal)[LIVE].abs().max() < 0.05
    if path_value == "network":
        value = trainer.networks.online.value_head.outer.weight.detach()[0, 0] * BETA
        if form == "dueling":
            assert float(value) == pytest.approx(float(soft(0, q[0])), abs=TOLERANCE)


def test_sentence_bleu_as_the_reward() -> None:
    """341 states; BLEU of every response against fixed references; soft Double DQN on the calibrated form."""
    world = World(vocabulary=4, length=4, seed=3)
    words = ("the", "", "cat", "sat")
    texts = [" ".join(words[token] for token in ids if token != EOS) for ids in world.responses]
    references = [["the cat sat", "cat sat the"]] * len(texts)
    world.rewards = dict(zip(world.responses, sentence_bleu(texts, references), strict=True))
    prior = world.reference.log_softmax(-1)
    optimum = world.optimum(lambda s, q: 0.25 * torch.logsumexp(prior[s] + q / 0.25, 0))
    settings = {"form": "calibrated", "backup": "soft_double", "target_polyak": 0.5, "beta": 0.25}
    trainer = learn(world, world_recipe(350, qlearning=settings), world.responses)
    assert (learnt_q(world, trainer) - optimum)[world.live()].abs().max() < TOLERANCE
    best = max(world.rewards, key=lambda ids: world.rewards[ids])
    assert texts[world.responses.index(best)] in references[0]


@pytest.mark.parametrize(
    "exploration",
    [
        {"temperature": 2.0},
        {"temperature": 2.0, "overlap_scoring": True},
        {"epsilon_greedy": True, "epsilon_start": 1.0, "epsilon_end": 0.5},
    ],
)
def test_rollouts_of_its_own_reach_the_optimum(exploration: dict[str, Any]) -> None:
    """No log: what is learnt from is sampled, Boltzmann or epsilon-greedy, and kept in the replay."""
    recipe = world_recipe(
        150,
        rollout={"prompts": 8, "samples": 8, "epsilon_decay": "exponential", **exploration},
        replay={"batch_groups": 20, "fresh_share": 0.0, "capacity_episodes": 2048, "learning_starts_episodes": 64},
        qlearning={"target_polyak": 0.3},
        evaluation={"every_steps": 1000},
    )
    trainer = trainer_of(WORLD, recipe)
    trainer.run(lambda: {"reward": 0.0}, lambda *_: None)
    assert (learnt_q(WORLD, trainer) - WORLD.optimum(soft))[LIVE].abs().max() < 5 * TOLERANCE
    assert len(trainer.replay) == 2048


def test_a_reset_of_the_reference_sharpens_the_policy_and_the_first_one_is_remembered() -> None:
    """Two stages of the soft optimum: the second one's prior is the first one's policy."""
    recipe = world_recipe(
        500, qlearning={"target_polyak": 0.3, "reference_reset_every": 250}, optimisation={"schedule": "constant"}
    )
    trainer = learn(WORLD, recipe, WORLD.responses)
    first = (LOG_PRIOR + WORLD.optimum(soft) / BETA).log_softmax(-1)
    torch.testing.assert_close(
        trainer.networks.reference.model.head.weight.T.log_softmax(-1)[LIVE], learnt_log_policy(trainer)[LIVE]
    )
    again = WORLD.optimum(lambda s, q: BETA * torch.logsumexp(first[s] + q / BETA, 0))
    second = (first + again / BETA).log_softmax(-1)
    assert (learnt_log_policy(trainer) - second)[LIVE].abs().max() < 0.05
    assert (second - first)[LIVE].abs().max() > 0.5
    assert trainer.networks.first is not None
    torch.testing.assert_close(trainer.networks.first.model.head.weight.T, WORLD.reference)
    assert all(episode.reference_log_probs is None for episode in trainer.replay.episodes())


OFFLINE = {"path": "log.jsonl", "steps_per_round": 10}


@pytest.mark.parametrize(("rounds", "reaches"), [(0, False), (20, True)])
def test_rollouts_that_join_a_narrow_log_find_what_it_lacks(rounds: int, reaches: bool) -> None:
    """The log never has token 3. Alone, what it does have is learnt; merged with rollouts, everything is."""
    recipe = world_recipe(
        250,
        rollout={"prompts": 8, "samples": 8, "temperature": 3.0},
        replay={"batch_groups": 50, "fresh_share": 0.0},
        qlearning={"target_polyak": 0.3},
        offline={**OFFLINE, "rounds": rounds},
        evaluation={"every_steps": 1000},
    )
    narrow = [[WORLD.episode(ids, number)] for number, ids in enumerate(r for r in WORLD.responses if 3 not in r)]
    trainer = trainer_of(WORLD, recipe, log=narrow)
    trainer.run(lambda: {"reward": 0.0}, lambda *_: None)
    error = (learnt_q(WORLD, trainer) - WORLD.optimum(soft))[LIVE].abs().max()
    assert error < 5 * TOLERANCE if reaches else error > 20 * TOLERANCE
    assert len(trainer.replay) == 64 * rounds


def test_keeping_the_most_telling_samples_moves_no_optimum() -> None:
    """Three of eight, by their rewards: what is kept says nothing false of what is not."""
    recipe = world_recipe(
        250,
        rollout={"prompts": 8, "samples": 8, "temperature": 2.0},
        replay={"batch_groups": 50, "fresh_share": 0.2, "kept_share": 0.3, "capacity_episodes": 6000},
        qlearning={"target_polyak": 0.3},
        evaluation={"every_steps": 1000},
    )
    trainer = trainer_of(WORLD, recipe)
    trainer.run(lambda: {"reward": 0.0}, lambda *_: None)
    assert len(trainer.replay) == 8 * 3 * 250
    assert (learnt_q(WORLD, trainer) - WORLD.optimum(soft))[LIVE].abs().max() < 5 * TOLERANCE


def test_a_log_by_priority_reaches_the_optimum() -> None:
    recipe = world_recipe(
        400,
        replay={"batch_groups": 20, "fresh_share": 0.0, "sampling": "prioritised", "priority_correction": 1.0},
        qlearning={"target_polyak": 0.3},
        offline=OFFLINE,
        evaluation={"every_steps": 1000},
    )
    log = [[WORLD.episode(ids, number)] for number, ids in enumerate(WORLD.responses)]
    trainer = trainer_of(WORLD, recipe, log=log)
    trainer.run(lambda: {"reward": 0.0}, lambda *_: None)
    assert (learnt_q(WORLD, trainer) - WORLD.optimum(soft))[LIVE].abs().max() < 3 * TOLERANCE


# --- what must not ------------------------------------------------------------------------------------------------

# A log without token 3, and rewards below 0: what was never tried looks best to a maximum.
NARROW = [ids for ids in WORLD.responses if 3 not in ids]


@pytest.fixture
def losing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WORLD, "rewards", {ids: reward - 1.5 for ids, reward in WORLD.rewards.items()})


def in_the_log(state: int, q: Tensor) -> Tensor:
    return q[:3].max()


@pytest.mark.parametrize("backup", ["hard", "double"])
def test_a_maximum_over_what_was_never_tried_misses(losing: None, backup: str) -> None:
    optimum = WORLD.optimum(in_the_log)
    assert miss(qlearning(backup=backup, form="calibrated"), NARROW, optimum) > 10 * TOLERANCE


def test_the_references_top_k_keeps_the_maximum_in_the_log(losing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = WORLD.reference.clone()
    reference[:, 3] = -20.0
    monkeypatch.setattr(WORLD, "reference", reference)
    recipe = qlearning(backup="hard", form="calibrated", backup_top_k=3)
    assert miss(recipe, NARROW, WORLD.optimum(in_the_log)) < TOLERANCE


def skewed() -> list[tuple[int, ...]]:
    """Every response, those that end with token 2 five times."""
    return [ids for ids in WORLD.responses for _ in range(5 if ids[-1] == 2 else 1)]


@pytest.mark.parametrize(("importance", "reaches"), [("episode", True), ("none", False)])
def test_whole_returns_of_a_skewed_log_need_importance_weights(
    importance: str, reaches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Q of the policy itself from Monte Carlo returns: the log's frequencies are not the policy's.

    The weights take frequencies of the log for the behaviour policy, so that they are exact.
    """
    log = skewed()
    counts = torch.zeros(WORLD.prefixes, WORLD.vocabulary)
    for ids in log:
        for s, a in WORLD.path(ids):
            counts[s, a] += 1
    behaviour = (counts / counts.sum(-1, keepdim=True)).log()
    plain = WORLD.episode

    def logged(ids: Any, group: int = 0) -> Any:
        episode = plain(ids, group)
        episode.behaviour_log_probs = torch.stack([behaviour[s, a] for s, a in WORLD.path(ids)])
        return episode

    monkeypatch.setattr(WORLD, "episode", logged)
    settings = {"backup": "expected", "trace": 1.0, "importance": importance, "importance_clip": 1e4}
    recipe = world_recipe(450, qlearning={"target_polyak": 0.3, **settings})
    error = miss(recipe, log, WORLD.optimum(of_the_policy))
    assert error < TOLERANCE if reaches else error > 5 * TOLERANCE


def test_the_policy_of_one_backup_is_not_that_of_another() -> None:
    """So that reaching an optimum above says which."""
    optima = [WORLD.optimum(oracle)[LIVE] for oracle in (soft, soft_uniform, hard, hard_in_top_2, expected)]
    for i, one in enumerate(optima):
        for other in optima[i + 1 :]:
            assert (one - other).abs().max() > 10 * TOLERANCE


# --- identities -----------------------------------------------------------------------------------------------------


def loss_and_gradient(recipe: Recipe, offset: float = 0.0) -> tuple[float, Tensor]:
    """Of 20 responses, with online and target away from the reference; `offset` moves every copy's logits by a c(s)."""
    generator = torch.Generator().manual_seed(1)
    start = WORLD.reference + torch.randn(WORLD.reference.shape, generator=generator)
    networks = networks_of(WORLD, recipe, start)
    shift = offset * torch.randn(WORLD.prefixes, 1, generator=generator)
    for network in (networks.online, networks.target, networks.reference):
        network.model.head.weight.data += shift.T
    batch = make_batch([WORLD.episode(ids) for ids in WORLD.responses[:20]], LAYOUT)
    loss = q_loss(batch, networks, recipe.qlearning, Exploration()).loss
    loss.backward()
    return float(loss.detach()), networks.online.model.head.weight.grad


@pytest.mark.parametrize("backup", ORACLES)
@pytest.mark.parametrize("form", ["dueling", "calibrated"])
def test_an_offset_of_every_copys_logits_changes_nothing(form: str, backup: str) -> None:
    recipe = qlearning(form=form, backup=backup, conservative=0.1, actor=0.0)
    plain, shifted = loss_and_gradient(recipe), loss_and_gradient(recipe, offset=10.0)
    assert plain[0] == pytest.approx(shifted[0], rel=1e-4)
    torch.testing.assert_close(plain[1], shifted[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("one", "other"), [("hard", "double"), ("soft", "soft_double")])
@pytest.mark.parametrize("form", ["dueling", "calibrated", "classic"])
def test_double_is_single_when_online_and_target_agree(form: str, one: str, other: str) -> None:
    losses = [loss_and_gradient(qlearning(form=form, backup=backup))[0] for backup in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("form", ["dueling", "calibrated", "classic"])
def test_the_conservative_term_is_the_mle_loss_up_to_a_constant(form: str) -> None:
    """Its gradient is that of -log pi of the log's tokens; its value differs by the reference's log-probability."""
    without, with_it = (loss_and_gradient(qlearning(form=form, conservative=weight)) for weight in (0.0, 1.0))
    generator = torch.Generator().manual_seed(1)
    start = WORLD.reference + torch.randn(WORLD.reference.shape, generator=generator)
    table = start.clone().requires_grad_()
    pairs = [pair for ids in WORLD.responses[:20] for pair in WORLD.path(ids)]
    mle = -sum(table.log_softmax(-1)[s, a] for s, a in pairs)
    assert isinstance(mle, Tensor)
    mle.backward()
    constant = 0.0 if form == "classic" else float(sum(LOG_PRIOR[s, a] for s, a in pairs))
    assert with_it[0] - without[0] == pytest.approx(float(mle) + constant, abs=1e-3)
    assert table.grad is not None
    torch.testing.assert_close(with_it[1] - without[1], table.grad.T, rtol=1e-3, atol=1e-3)


def test_the_actors_gradient_is_minus_the_advantage_times_that_of_log_pi() -> None:
    """Hard one-step backup of the dueling form, whose V and targets the actor's gradient leaves alone."""
    settings = {"backup": "hard", "trace": 0.0}
    without, with_it = (loss_and_gradient(qlearning(actor=weight, **settings)) for weight in (0.0, 2.0))
    generator = torch.Generator().manual_seed(1)
    table = (WORLD.reference + torch.randn(WORLD.reference.shape, generator=generator)).requires_grad_()
    q = BETA * (table.log_softmax(-1) - LOG_PRIOR).detach()  # V_phi is 0 at the start
    best = q.amax(-1)
    total = torch.zeros(())
    for ids in WORLD.responses[:20]:
        path = WORLD.path(ids)
        for (s, a), following in zip(path, [*(s for s, _ in path[1:]), None], strict=True):
            end = s * WORLD.vocabulary + a + 1
            after = float(best[following]) if following is not None else WORLD.rewards[ids]
            after += float(best[end]) if following is None and a != EOS else 0.0
            total = total - 2.0 * (after - float(best[s])) / BETA * table.log_softmax(-1)[s, a]
    total.backward()
    assert table.grad is not None
    torch.testing.assert_close(with_it[1] - without[1], table.grad.T, rtol=1e-3, atol=1e-3)


def test_episode_weights_are_unbiased_over_the_enumerated_world() -> None:
    """sum over all responses of mu(y) min(c, pi/mu)(y) R(y) is E_pi[R] when nothing is cut."""
    policy = WORLD.reference.flip(-1).log_softmax(-1)
    exact = estimate = 0.0
    for ids in WORLD.responses:
        steps = WORLD.path(ids)
        log_pi, log_mu = (torch.stack([table[s, a] for s, a in steps])[None] for table in (policy, LOG_PRIOR))
        mask = torch.ones_like(log_pi, dtype=torch.bool)
        weight = importance_weights(log_pi, log_mu, mask, "episode", 1e6)[0, 0]
        exact += float(log_pi.sum().exp()) * WORLD.rewards[ids]
        estimate += float(log_mu.sum().exp() * weight) * WORLD.rewards[ids]
        assert float(importance_weights(log_pi, log_mu, mask, "token", 1e6).prod()) == pytest.approx(
            float(weight), rel=1e-4
        )
    assert estimate == pytest.approx(exact, abs=1e-5)
    assert any(ids[-1] != EOS for ids in WORLD.responses)
