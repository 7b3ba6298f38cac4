"""What the value head is shown of the references, against rouge-score's table and numbers worked by hand."""

import random
from math import nan

import pytest
import torch
from rouge_score import rouge_scorer

from lmdqn.episodes import MATCH_FEATURES, VALUE_FEATURES, Episode, Example, SequenceFormat, make_batch
from lmdqn.learn.match_features import mean_and_deviation, measure_matches, subsequence_lengths, value_moments


def measured(response: list[int], *references: list[int]) -> torch.Tensor:
    example = Example("", ("",) * len(references), (5,), tuple(tuple(ids) for ids in references), "")
    episode = Episode(example, response, truncated=False, group=0)
    measure_matches([episode])
    assert episode.match_features is not None
    assert episode.match_features.shape == (len(response) + 1, MATCH_FEATURES)
    return episode.match_features


def test_lcs_lengths_are_rouge_scores() -> None:
    chance = random.Random(0)
    for _ in range(60):
        response, *references = [
            tuple([chance.randrange(4) for _ in range(chance.randint(1, 40))]) for _ in range(chance.randint(2, 5))
        ]
        tables = [rouge_scorer._lcs_table(response, reference) for reference in references]
        wanted = [[table[t][-1] for table in tables] for t in range(len(response) + 1)]
        assert subsequence_lengths(response, tuple(references)).tolist() == wanted


def test_three_tokens_and_two_references_by_hand() -> None:
    """Response 5 6 5; references 5 7 6 9 and 6 5, three tokens on average; nan where a prefix has no such n-gram.

    Longest common subsequences with the first: 0 1 2 2; with the second: 0 1 1 2. The second 5 is one more than
    either reference has, so only two of three single tokens count; of bigrams 6 5 is found and 5 6 is not.
    """
    wanted = torch.tensor(
        [
            # recall, precision, F, 1-grams, 2-grams, 3-grams, 4-grams, matching end, length
            [0.0, 0.0, 0.0, nan, nan, nan, nan, 0.0, 0.0],
            [1 / 2, 1.0, 2 / 3, 1.0, nan, nan, nan, 1 / 4, 1 / 3],
            [2 / 4, 2 / 2, 4 / 6, 1.0, 0.0, nan, nan, 1 / 4, 2 / 3],
            [2 / 2, 2 / 3, 4 / 5, 2 / 3, 1 / 2, 0.0, nan, 2 / 4, 3 / 3],
        ]
    )
    found = measured([5, 6, 5], [5, 7, 6, 9], [6, 5])
    assert not found.isnan().any()
    torch.testing.assert_close(torch.where(wanted.isnan(), nan, found), wanted, equal_nan=True)


def test_a_response_equal_to_a_reference_matches_wholly_at_its_end() -> None:
    found = measured([5, 6, 7, 8, 2], [9, 9, 2], [5, 6, 7, 8, 2])
    assert found[-1].tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5 / 4]
    assert found[:-1, 2].max() < 1
    assert found[1:, 1].tolist() == [1.0] * 5


def test_a_response_of_other_tokens_matches_nothing() -> None:
    found = measured([5, 6, 7, 8], [9, 10], [11])
    assert found[1:, :4].count_nonzero() == 0
    assert found[4, :-1].count_nonzero() == 0
    torch.testing.assert_close(found[:, -1], torch.arange(5) / 1.5)


def test_bigrams_are_clipped_by_the_reference_that_has_most_of_them() -> None:
    """5 5 stands three times in 5 5 5 5, twice in the second reference and once in the first."""
    found = measured([5, 5, 5, 5], [5, 5], [5, 5, 5])
    assert found[-1, 3].item() == pytest.approx(3 / 4)
    assert found[-1, 4].item() == pytest.approx(2 / 3)
    assert found[-1, 5].item() == pytest.approx(1 / 2)


def test_episodes_do_not_change_each_other() -> None:
    chance = random.Random(1)
    episodes = []
    for group in range(6):
        references = tuple(
            tuple(chance.randrange(3, 7) for _ in range(chance.randint(1, 6))) for _ in range(chance.randint(1, 3))
        )
        response = [chance.randrange(3, 7) for _ in range(chance.randint(1, 8))]
        example = Example("", ("",) * len(references), (5,), references, "")
        episodes.append(Episode(example, response, truncated=False, group=group))
    measure_matches(episodes)
    for episode in episodes:
        alone = measured(episode.response_ids, *map(list, episode.example.reference_ids))
        assert episode.match_features is not None
        assert torch.equal(episode.match_features, alone)


def test_episodes_without_references_are_left_alone() -> None:
    without = Episode(Example("", (), (5,), (), ""), [6, 2], truncated=False, group=0)
    having = Episode(Example("", ("",), (5,), ((6, 2),), ""), [6, 2], truncated=False, group=1)
    measure_matches([without, having])
    assert without.match_features is None
    assert having.match_features is not None
    measure_matches([without])
    assert without.match_features is None


def test_mean_and_deviation_are_over_the_states_that_know_a_feature() -> None:
    """Three episodes of different lengths; one episode knows no match features, none its peers, all their return."""
    generator = torch.Generator().manual_seed(0)
    layout = SequenceFormat(pad_id=0, eos_ids=(1,), decoder_prefix=None, context_tokens=None)
    example = Example("", ("",), (9,), (), "")
    episodes = [Episode(example, [5] * n + [1], False, group=n, reward=n / 10, baseline=0.1) for n in (3, 1, 4)]
    for episode in episodes[:2]:
        episode.match_features = 3 * torch.rand(len(episode.response_ids) + 1, MATCH_FEATURES, generator=generator)
    known = torch.cat([e.match_features[:-1] for e in episodes if e.match_features is not None])  # the last is terminal
    shares = [value_moments([make_batch([episode], layout)]) for episode in episodes]
    together = value_moments([make_batch(episodes, layout)])
    torch.testing.assert_close(torch.stack(shares).sum(0), together)
    mean, deviation = mean_and_deviation(together)
    assert mean.shape == deviation.shape == (VALUE_FEATURES + 1,)
    torch.testing.assert_close(mean[:-2], known.mean(0))
    torch.testing.assert_close(deviation[:-2], known.std(0, correction=0))
    assert mean[-2] == deviation[-2] == 0
    returns = torch.tensor([0.2] * 4 + [0.0] * 2 + [0.3] * 5)  # of each state's episode
    torch.testing.assert_close(mean[-1], returns.mean())
    torch.testing.assert_close(deviation[-1], returns.std(correction=0))


def test_a_process_without_a_share_adds_nothing() -> None:
    assert value_moments([]).tolist() == [[0.0] * (VALUE_FEATURES + 1)] * 3
