"""The sum tree and prioritised draws, against plain sums and against frequencies."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdqn.episodes import Episode, Example
from lmdqn.learn.priorities import Priorities, SumTree
from lmdqn.learn.replay import Group, Replay
from lmdqn.recipe import ReplaySection

EXAMPLE = Example("", (), (5,), (), "")


def rollout(*groups: int, size: int = 2, reward: float = 0.0) -> list[Group]:
    return [[Episode(EXAMPLE, [7, 2], False, group, reward=reward) for _ in range(size)] for group in groups]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.floats(0, 100)), min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
)
def test_a_sum_tree_is_its_leaves(changes: list[tuple[int, float]], share: float) -> None:
    """After any changes: the total is the sum, and a point falls into the leaf where plain addition puts it."""
    tree, leaves = SumTree(13), [0.0] * 13
    for slot, mass in changes:
        tree[slot] = leaves[slot] = mass
    assert [tree[slot] for slot in range(13)] == leaves
    assert tree.total == pytest.approx(sum(leaves))
    if tree.total > 0:
        slot = tree.find(share * tree.total)
        assert leaves[slot] > 0
        before = sum(leaves[:slot])
        slack = 1e-9 * tree.total
        assert before - slack <= share * tree.total <= before + leaves[slot] + slack


ORDERS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.tuples(st.integers(1, 4), st.integers(1, 3))),  # groups, their size
        st.tuples(st.just("draw"), st.tuples(st.integers(1, 12), st.integers(0, 99))),  # groups, a seed
        st.tuples(st.just("learn"), st.lists(st.sampled_from([0.0, 0.1, 1.0, 100.0]), min_size=4, max_size=12)),
        st.tuples(st.just("reload"), st.just(None)),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(4, 40), st.sampled_from(["uniform", "prioritised", "reward"]), ORDERS)
def test_any_replay_keeps_its_promises(capacity: int, sampling: str, order: list[tuple[str, Any]]) -> None:
    """In every order of adding, drawing, learning and saving: nothing evicted, whole groups, weights in (0, 1].

    One replay goes straight on, its twin is saved and loaded now and then: they draw the same, by the same weights.
    """
    recipe = ReplaySection.model_validate({"capacity_episodes": capacity, "sampling": sampling, "fresh_share": 0.5})
    replay, twin = Replay(recipe), Replay(recipe)
    older, newest, number = list[Group](), list[Group](), 0  # what must be held
    for what, how in order:
        if what == "add":
            groups, size = how
            older, newest = older + newest, rollout(*range(number, number + groups), size=size)
            number += groups
            while older and sum(map(len, older + newest)) > capacity:
                del older[0]
            for each in (replay, twin):
                each.add(newest)
        elif what == "draw":
            count, seed = how
            draws, twins = (each.draw(count, torch.Generator().manual_seed(seed), 0.5) for each in (replay, twin))
            assert [(d.number, d.weight) for d in draws] == [(d.number, d.weight) for d in twins]
            held = {group[0].group: group for group in older + newest}
            for draw in draws:
                assert draw.group == held[draw.number]
                assert 0 < draw.weight <= 1
            if sampling != "prioritised":
                assert len({draw.number for draw in draws}) == len(draws) == min(count, len(held))
        elif what == "learn":  # residuals of the first groups, also of those that have left or never were
            for each in (replay, twin):
                each.learnt_from(dict(enumerate(how)))
        else:
            twin = Replay(recipe)
            twin.restore(replay.state(by_number(replay)))
        assert list(replay.episodes()) == [episode for group in older + newest for episode in group]
        assert len(replay) == len(twin) == sum(map(len, older + newest))


def by_number(*replays: Replay) -> dict[int, Group]:
    """The groups that some processes' replays hold."""
    groups: dict[int, Group] = {}
    for episode in (episode for replay in replays for episode in replay.episodes()):
        groups.setdefault(episode.group, []).append(episode)
    return groups


@pytest.mark.parametrize("sampling", ["uniform", "prioritised", "reward"])
def test_processes_draw_the_same_and_each_holds_its_share(sampling: str) -> None:
    """What any of them cannot give another can; and a state that all gave goes on in another number of processes."""
    recipe = ReplaySection.model_validate({"capacity_episodes": 14, "sampling": sampling, "fresh_share": 0.5})
    alone = Replay(recipe)
    shared = [Replay(recipe, holds=lambda number, rank=rank: number % 3 == rank) for rank in range(3)]  # type: ignore[misc]
    for first in (0, 4, 8):
        for replay in (alone, *shared):
            replay.add(rollout(*range(first, first + 4)))
            replay.learnt_from({number: 0.1 * number for number in range(first)})
    assert [len(replay) for replay in shared] == [len(alone)] * 3
    assert [{e.group % 3 for e in replay.episodes()} for replay in shared] == [{0}, {1}, {2}]
    again = Replay(recipe, holds=lambda number: number < 8)
    again.restore(shared[1].state(by_number(*shared)))
    drawn = [replay.draw(5, torch.Generator().manual_seed(1), 0.5) for replay in (alone, *shared, again)]
    for other in drawn[1:]:
        assert [(draw.number, draw.weight) for draw in other] == [(draw.number, draw.weight) for draw in drawn[0]]
    for draws in zip(*drawn[1:4], strict=True):
        assert sum(draw.group is not None for draw in draws) == 1
    assert {e.group for e in again.episodes()} == {n for n in by_number(alone) if n < 8}


def prioritised(alpha: float, residuals: list[float]) -> Replay:
    recipe = ReplaySection(sampling="prioritised", fresh_share=0.0, priority_exponent=alpha)
    replay = Replay(recipe)
    replay.add(rollout(*range(len(residuals))))
    replay.add(rollout(len(residuals)))
    replay.learnt_from(dict(enumerate(residuals)))
    return replay


def chi_square(replay: Replay, shares: torch.Tensor, draws: int) -> float:
    """Of single draws, as those of one batch are stratified and so less than random."""
    priorities, generator = replay._priorities, torch.Generator().manual_seed(0)
    assert priorities is not None
    counts = Counter(priorities.draw(1, generator, 0.0)[0][0] for _ in range(draws))
    expected = shares * draws
    return float(sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(len(shares))))


def test_alpha_0_is_uniform() -> None:
    """100,000 draws of 8 groups; chi-square with 7 degrees of freedom is above 24.3 in one case of a thousand."""
    replay = prioritised(0.0, [0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 100.0])
    assert chi_square(replay, torch.full((8,), 1 / 8), 100_000) < 24.3


def test_draws_are_in_proportion_to_the_residual_to_the_alpha() -> None:
    residuals = [0.1, 0.5, 1.0, 2.0]
    masses = torch.tensor([(r + 1e-3) ** 0.6 for r in residuals])
    replay = prioritised(0.6, residuals)
    assert chi_square(replay, masses / masses.sum(), 20_000) < 16.3  # 3 degrees of freedom, one in a thousand
    assert chi_square(replay, torch.full((4,), 1 / 4), 20_000) > 1000  # so that the tests above can fail


def test_full_correction_makes_weighted_draws_unbiased() -> None:
    """E[w x] over draws is, up to a constant, the plain mean of x: (1/N) sum x."""
    replay = prioritised(0.6, [0.1, 0.5, 1.0, 2.0])
    priorities = replay._priorities
    assert priorities is not None
    generator = torch.Generator().manual_seed(0)
    values, totals = [3.0, -1.0, 4.0, 1.0], [0.0, 0.0]
    for _ in range(4000):
        for number, weight in priorities.draw(8, generator, correction=1.0):
            totals[0] += weight * values[number]
            totals[1] += weight
    assert totals[0] / totals[1] == pytest.approx(sum(values) / 4, abs=0.05)


def test_a_new_group_has_the_greatest_priority_so_far() -> None:
    priorities = Priorities(alpha=1.0)
    for number in (0, 1):
        priorities.enter(number, 0.0)
    priorities.learnt_from({0: 5.0, 1: 0.0})
    priorities.enter(2, 0.0)
    masses = {
        number: float(mass)
        for number, mass in zip(*(priorities.state()[k].tolist() for k in ("numbers", "masses")), strict=True)
    }
    assert masses == pytest.approx({0: 5.001, 1: 0.001, 2: 5.001})


def test_reward_sampling_prefers_what_was_rewarded() -> None:
    """Softmax at temperature .5 of rewards 0 and 1: 1 / (1 + e^-2) = .881 of single draws."""
    replay = Replay(ReplaySection(sampling="reward", fresh_share=0.0, reward_temperature=0.5))
    replay.add([*rollout(0, reward=0.0), *rollout(1, reward=1.0)])
    replay.add(rollout(2))
    generator = torch.Generator().manual_seed(0)
    share = sum(replay.draw(1, generator)[0].number for _ in range(4000)) / 4000
    assert share == pytest.approx(0.881, abs=0.02)


def test_capacity_in_tokens() -> None:
    """Each group holds four tokens; eight fit."""
    replay = Replay(ReplaySection(capacity_tokens=8))
    for number in range(5):
        replay.add(rollout(number))
    assert {episode.group for episode in replay.episodes()} == {3, 4}
    assert replay.tokens == 8
