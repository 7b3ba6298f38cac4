"""Episodes packed and unpacked are what they were, bit for bit."""

from dataclasses import fields, replace

import pytest
import torch

from lmdqn.episodes import MATCH_FEATURES, Episode, Example
from lmdqn.learn.packing import LOG_PROBS, MADE_AGAIN, PackedEpisodes

EXAMPLES = [Example("a", ("b", "c"), (5, 6), ((7, 2), (8, 2)), "a:"), Example("", (), (5,), (), "")]


def some_episodes() -> list[Episode]:
    """Everything measured, half of it, nothing; texts that are odd."""
    generator = torch.Generator().manual_seed(0)
    full = Episode(EXAMPLES[0], [70_000, 3, 2], False, 2**40, demonstration=True)
    for name in LOG_PROBS:
        setattr(full, name, -torch.rand(3, generator=generator) / 3)
    full.behaviour_log_probs = torch.tensor([-0.1, -torch.inf, 0.0])
    full.match_features = torch.rand(4, MATCH_FEATURES, generator=generator)
    full = replace(
        full, text="Größe \ud800\x00 中", reward=1 / 3, terms={"bleu": 0.1, "f": -2.0}, baseline=1e-9, peers=0.0
    )
    half = Episode(EXAMPLES[1], [1], True, 7, text="", terms={"g": 0.5})
    half.reference_log_probs = torch.tensor([-1 / 7])
    return [half, full, Episode(EXAMPLES[0], [4, 4], False, 8)]


def assert_equal(found: Episode, wanted: Episode, without: tuple[str, ...] = ()) -> None:
    assert found.example is wanted.example
    for name in (f.name for f in fields(Episode) if f.name not in ("example", *MADE_AGAIN, *without)):
        one, other = getattr(found, name), getattr(wanted, name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), name
        else:
            assert one == other, name
            assert type(one) is type(other), name


def test_every_field_comes_back() -> None:
    episodes = some_episodes()
    for found, wanted in zip(PackedEpisodes.of(episodes).episodes(), episodes, strict=True):
        assert_equal(found, wanted)


def test_a_part_comes_back_without_features() -> None:
    episodes = some_episodes()
    found = PackedEpisodes.of(episodes, match_features=False).episodes(1, 2)
    assert len(found) == 2
    assert found[0].match_features is None
    for one, wanted in zip(found, episodes[1:], strict=True):
        assert_equal(one, wanted, ("match_features",))


@pytest.mark.parametrize("name", LOG_PROBS)
def test_what_is_forgotten_can_be_measured_again(name: str) -> None:
    episodes = some_episodes()
    packed = PackedEpisodes.of(episodes)
    packed.forget(name)
    assert [getattr(e, name) for e in packed.episodes()] == [None] * 3
    again = packed.episodes(1, 1)
    setattr(again[0], name, torch.tensor([-1.0, -2.0, -1 / 3]))
    packed.measured(1, again)
    found = packed.episodes()
    assert_equal(found[1], again[0])
    assert getattr(found[0], name) is None
    assert getattr(found[2], name) is None
