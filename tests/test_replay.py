"""The replay: what stays, and what a batch is drawn from."""

import tracemalloc
from collections import Counter
from typing import Any

import pytest
import torch

from lmdqn.episodes import MATCH_FEATURES, Episode, Example
from lmdqn.learn.replay import Draw, Group, Replay, _different, most_telling
from lmdqn.model.memory import replay_bytes
from lmdqn.recipe import ReplaySection, validate

EXAMPLE = Example("", (), (5,), (), "")


def rollout(*groups: int, size: int = 2) -> list[Group]:
    """Groups of `size` episodes, by their numbers."""
    return [[Episode(EXAMPLE, [7, 2], truncated=False, group=group) for _ in range(size)] for group in groups]


def filled(*rollouts: list[Group], capacity: int = 1000, **settings: Any) -> Replay:
    replay = Replay(ReplaySection(capacity_episodes=capacity, **settings))
    for groups in rollouts:
        replay.add(groups)
    return replay


def drawn(replay: Replay, groups: int, fresh_share: float, seed: int = 0) -> list[Episode]:
    replay.recipe = replay.recipe.model_copy(update={"fresh_share": fresh_share})
    return episodes(replay.draw(groups, torch.Generator().manual_seed(seed)))


def episodes(draws: list[Draw]) -> list[Episode]:
    return [episode for draw in draws for episode in draw.group or ()]


def held(replay: Replay) -> set[int]:
    """The numbers of all groups."""
    return {episode.group for episode in drawn(replay, 1000, 0.5)}


def test_it_counts_episodes() -> None:
    assert len(filled(capacity=10)) == 0
    assert len(filled(rollout(0, 1, size=3), rollout(2, size=4))) == 10


def test_the_oldest_groups_leave_first() -> None:
    replay = filled(rollout(0, 1, 2), rollout(3, 4), capacity=8)
    assert held(replay) == {1, 2, 3, 4}
    replay.add(rollout(5))
    assert held(replay) == {2, 3, 4, 5}
    assert len(replay) == 8


def test_what_just_fits_stays() -> None:
    assert held(filled(rollout(0, 1), rollout(2), capacity=6)) == {0, 1, 2}


def test_a_whole_group_leaves_though_one_episode_is_too_many() -> None:
    replay = filled(rollout(0, size=3), rollout(1, size=3), rollout(2, size=3), capacity=8)
    assert held(replay) == {1, 2}
    assert len(replay) == 6


def test_the_newest_rollout_stays_even_over_capacity() -> None:
    replay = filled(rollout(0), rollout(1, 2, 3, size=4), capacity=5)
    assert held(replay) == {1, 2, 3}
    assert len(replay) == 12
    replay.add(rollout(4))
    assert held(replay) == {4}


@pytest.mark.parametrize("fresh_share", [0.0, 0.5, 1.0])
def test_groups_are_whole_and_none_comes_twice(fresh_share: float) -> None:
    replay = filled(rollout(*range(6), size=3), rollout(*range(6, 12), size=3))
    for seed in range(50):
        counts = Counter(id(episode) for episode in drawn(replay, 5, fresh_share, seed))
        groups = Counter(episode.group for episode in drawn(replay, 5, fresh_share, seed))
        assert set(counts.values()) == {1}
        assert len(groups) == 5
        assert set(groups.values()) == {3}


@pytest.mark.parametrize(("fresh_share", "fresh"), [(1.0, 8), (0.0, 0), (0.5, 4), (0.25, 2)])
def test_share_of_the_newest_rollout(fresh_share: float, fresh: int) -> None:
    replay = filled(rollout(*range(10)), rollout(*range(10, 20)), rollout(*range(20, 30)))
    for seed in range(20):
        groups = {episode.group for episode in drawn(replay, 8, fresh_share, seed)}
        assert len(groups) == 8
        assert sum(group >= 20 for group in groups) == fresh


@pytest.mark.parametrize(
    ("older", "fresh", "share", "from_fresh"),
    [
        (10, 3, 1.0, 3),  # the newest rollout is too small: five older ones fill in
        (10, 3, 0.5, 3),
        (2, 10, 0.0, 6),  # too few older ones: six fresh ones fill in
        (2, 10, 0.5, 6),
        (0, 10, 0.0, 8),
    ],
)
def test_the_other_side_fills_in(older: int, fresh: int, share: float, from_fresh: int) -> None:
    replay = filled(rollout(*range(100, 100 + older)), rollout(*range(fresh)))
    groups = [episode.group for episode in drawn(replay, 8, share)][::2]
    assert len(groups) == 8
    assert sum(group < 100 for group in groups) == from_fresh


def test_fewer_groups_than_asked_give_all_there_are() -> None:
    assert sorted(e.group for e in drawn(filled(rollout(0), rollout(1, 2)), 8, 0.5)) == [0, 0, 1, 1, 2, 2]


def test_older_groups_are_drawn_uniformly() -> None:
    """Of 8 older groups 2 are drawn 400 times: 100 draws of each expected, standard deviation 8.7."""
    replay = filled(rollout(*range(8)), rollout(8), fresh_share=0.0)
    generator = torch.Generator().manual_seed(0)
    counts = Counter(e.group for _ in range(400) for e in episodes(replay.draw(2, generator))[::2])
    assert set(counts) == set(range(8))
    assert all(60 < count < 140 for count in counts.values())


def test_the_generator_fixes_the_batch() -> None:
    replay = filled(rollout(*range(20)), rollout(*range(20, 40)))
    batches = [[episode.group for episode in drawn(replay, 6, 0.5, seed)] for seed in (3, 3, 4)]
    assert batches[0] == batches[1] != batches[2]


def test_different_places_are_drawn_uniformly() -> None:
    counts: Counter[int] = Counter()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        places = _different(6, 4, generator)
        assert len(set(places)) == 4
        counts.update(places)
    assert all(1870 < counts[place] < 2130 for place in range(6))  # 2,000 expected, standard deviation 26
    assert sorted(_different(5, 5, generator)) == [0, 1, 2, 3, 4]
    assert _different(5, 0, generator) == []


def test_older_groups_are_copies_that_keep_what_they_are_measured_for() -> None:
    replay = filled(rollout(0, 1), rollout(2), fresh_share=0.0)
    old = [draw.group for draw in replay.draw(2, torch.Generator()) if draw.group is not None]
    for episode in (e for group in old for e in group):
        assert episode.reference_log_probs is None
        episode.reference_log_probs = torch.tensor([-float(episode.group), -0.5])
    replay.keep_measured(old)
    assert [e.reference_log_probs is None for e in replay.episodes()] == [False] * 4 + [True] * 2
    for draw in replay.draw(2, torch.Generator().manual_seed(1)):
        assert draw.group is not None
        for episode in draw.group:
            assert episode.reference_log_probs is not None
            assert episode.reference_log_probs.tolist() == [-draw.number, -0.5]
    replay.forget_reference()
    assert all(e.reference_log_probs is None for e in replay.episodes())


@pytest.mark.parametrize(
    ("share", "kept"),
    [(1.0, [0, 1, 2, 3, 4, 5]), (0.6, [0, 2, 4, 5]), (0.5, [0, 2, 4]), (0.1, [0, 2])],
)
def test_the_samples_furthest_from_their_mean_are_kept(share: float, kept: list[int]) -> None:
    """Of six samples .4, .15, .5, 0, .3 and .25 from their mean of .5, and a reference, which stays."""
    rewards = [0.9, 0.65, 0.0, 0.5, 0.2, 0.75]
    group = [Episode(EXAMPLE, [7, 2], truncated=False, group=0, reward=reward) for reward in rewards]
    reference = Episode(EXAMPLE, [7, 2], truncated=False, group=0, reward=1.0, demonstration=True)
    telling = most_telling([*group, reference], share)
    assert [number for number, episode in enumerate(group) if any(episode is one for one in telling)] == kept
    assert telling[-1] is reference


@pytest.mark.parametrize("size", [1, 2])
def test_no_fewer_than_two_samples_are_kept(size: int) -> None:
    (group,) = rollout(0, size=size)
    assert most_telling(group, 0.1) == group


def test_the_memory_estimate_is_near_what_a_full_replay_takes() -> None:
    """Allocations of Python, numpy and torch for 2,048 episodes of 50 tokens, everything measured, within a half."""
    capacity = {"capacity_episodes": 2048}
    data = {"path": ".", "max_response_tokens": 50}
    recipe = validate({"model": {"from_scratch": {}}, "data": data, "replay": capacity}, "test")
    tracemalloc.start()
    replay = Replay(recipe.replay)
    for number in range(0, 512, 16):
        replay.add([measured_group(group) for group in range(number, number + 16)])
    tensors = 64 * 4 * (100 + 51 * MATCH_FEATURES)  # of the newest rollout: torch's are not traced
    taken = tracemalloc.get_traced_memory()[0] + tensors
    tracemalloc.stop()
    assert len(replay) == 2048
    assert 1 / 1.5 < replay_bytes(recipe) / taken < 1.5
    assert packed_bytes_a_token(replay) < 24
    fewer = recipe.replay.model_copy(update={"capacity_tokens": 51200})
    newest = replay_bytes(recipe.model_copy(update={"replay": fewer.model_copy(update={"capacity_episodes": 0})}))
    half = replay_bytes(recipe.model_copy(update={"replay": fewer}))
    assert half - newest == (replay_bytes(recipe) - newest) // 2


def measured_group(number: int) -> Group:
    group = []
    for k in range(4):
        ids = [1000 + number + k + t for t in range(50)]
        episode = Episode(EXAMPLE, ids, False, number, text="word " * 40, terms={"bleu": 0.5, "rougeL": 0.25})
        episode.behaviour_log_probs, episode.reference_log_probs = torch.zeros(50), torch.zeros(50)
        episode.match_features = torch.zeros(51, MATCH_FEATURES)
        group.append(episode)
    return group


def packed_bytes_a_token(replay: Replay) -> float:
    """Of the columns alone."""
    blocks = {id(held.packed): held.packed for held in replay._older if held.packed is not None}.values()
    tokens = sum(len(block.columns["response_ids"]) for block in blocks)
    return sum(column.nbytes for block in blocks for column in block.columns.values()) / tokens
