"""What V said against what came: returns by hand, ranks by hand, and which states are kept."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lmdqn.episodes import Episode, Example, SequenceFormat, make_batch
from lmdqn.learn.objective import Learnt
from lmdqn.learn.step_record import Update
from lmdqn.recipe import QLearningSection
from lmdqn.results.calibration import (
    Calibration,
    by_position,
    discounted_sums,
    explained,
    rank_correlation,
    read_calibration,
    reliability,
)

EXAMPLE = Example("s", ("r",), (5, 6), ((7, 2),), "s")


def update(*episodes: Episode) -> Update:
    """V(s_t) = t / 10 and l_t = 1 nat everywhere."""
    batch = make_batch(list(episodes), SequenceFormat(0, (2,), None, None))
    shape = batch.response_mask.shape
    log_ratios = torch.ones(shape) * batch.response_mask
    values = torch.arange(shape[1]).expand(shape) / 10
    learnt = Learnt(torch.zeros(()), torch.zeros(shape), log_ratios, values)
    return Update([list(episodes)], [batch], [learnt], 1, 0.0)


def episode(
    ids: list[int], reward: float, group: int = 0, truncated: bool = False, demonstration: bool = False
) -> Episode:
    return Episode(EXAMPLE, ids, truncated, group, demonstration, reward=reward, baseline=0.25)


def test_discounted_sums_by_hand() -> None:
    sums = discounted_sums(torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]]), 0.5)
    assert sums.tolist() == [[3.0, 4.0, 4.0], [2.0, 4.0, 8.0]]


def test_a_fresh_episode_gives_a_row_a_state(tmp_path: Path) -> None:
    """R - b = .5 at the end, beta l = .1 a token: G = .5 - .1 (n - t)."""
    kept = Calibration(QLearningSection(beta=0.1))
    kept.add(3, update(episode([7, 8, 2], 0.75), episode([7, 2], 0.25, group=1)), {0, 1})
    kept.save(tmp_path / "c.parquet")
    columns = read_calibration(tmp_path / "c.parquet")
    assert columns["step"].tolist() == [3] * 5
    assert columns["episode"].tolist() == [0, 0, 0, 1, 1]
    assert columns["position"].tolist() == [0, 1, 2, 0, 1]
    assert columns["tokens"].tolist() == [3, 3, 3, 2, 2]
    assert columns["value"] == pytest.approx([0, 0.1, 0.2, 0, 0.1])
    assert columns["realised"] == pytest.approx([0.2, 0.3, 0.4, -0.2, -0.1], abs=1e-6)


def test_the_classic_forms_return_is_of_rewards_alone(tmp_path: Path) -> None:
    kept = Calibration(QLearningSection(beta=0.1, form="classic"))
    kept.add(1, update(episode([7, 2], 0.75)), {0})
    kept.save(tmp_path / "c.parquet")
    assert read_calibration(tmp_path / "c.parquet")["realised"].tolist() == [0.5, 0.5]


def test_what_is_not_fresh_sampled_and_ended_is_left_out(tmp_path: Path) -> None:
    kept = Calibration(QLearningSection())
    old, shown = episode([7, 2], 1.0, group=4), episode([7, 2], 1.0, demonstration=True)
    kept.add(1, update(old, shown, episode([7, 8], 1.0, truncated=True)), {0})
    path = Calibration(QLearningSection(loss="path"))
    path.add(1, update(episode([7, 2], 1.0)), {0})
    for empty in (kept, path):
        empty.save(tmp_path / "c.parquet")
        assert not (tmp_path / "c.parquet").exists()


def test_only_the_newest_rollouts_are_kept(tmp_path: Path) -> None:
    kept = Calibration(QLearningSection(), max_states=5)
    for step in range(1, 5):
        kept.add(step, update(episode([7, 2], 1.0)), {0})
    kept.save(tmp_path / "c.parquet")
    assert read_calibration(tmp_path / "c.parquet")["step"].tolist() == [3, 3, 4, 4]
    kept.add(5, update(*[episode([7, 8, 2], 1.0) for _ in range(3)]), {0})
    kept.save(tmp_path / "c.parquet")
    assert set(read_calibration(tmp_path / "c.parquet")["step"]) == {5}


@pytest.mark.parametrize(
    ("first", "second", "correlation"),
    [
        ([1, 2, 3, 4], [10, 20, 25, 1000], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / np.sqrt(4.5 * 5)),  # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4
        ([1, 1, 1], [1, 2, 3], 0.0),
    ],
)
def test_rank_correlation_is_spearmans(first: list[float], second: list[float], correlation: float) -> None:
    assert rank_correlation(np.array(first), np.array(second)) == pytest.approx(correlation)


def test_explained_share() -> None:
    returns = np.array([0.0, 1.0, 2.0, 3.0])
    assert explained(returns, returns) == 1
    assert explained(np.full(4, 7.0), returns) == 0
    assert explained(-returns, returns) == pytest.approx(-3)
    assert explained(returns, np.ones(4)) == 0


def test_reliability_bins_are_equally_full_and_by_predicted_value() -> None:
    rows = reliability(np.array([4.0, 1, 3, 2]), np.array([8.0, 0, 4, 2]), bins=2)
    assert rows == [(1.5, 1.0, pytest.approx(1 / np.sqrt(2))), (3.5, 6.0, pytest.approx(2 / np.sqrt(2)))]
    assert len(reliability(np.array([1.0]), np.array([1.0]))) == 1


def test_agreement_by_position_splits_the_response() -> None:
    """In the first half V has the returns' order, in the second the opposite one."""
    positions = np.tile([0, 1], 3)
    columns = {"position": positions, "tokens": np.full(6, 2)}
    columns |= {"value": np.array([1.0, 1, 2, 2, 3, 3]), "realised": np.array([1.0, 3, 2, 2, 3, 1])}
    assert by_position(columns, bins=2) == [(0.25, 1.0, 1.0), (0.75, -1.0, pytest.approx(-3))]
