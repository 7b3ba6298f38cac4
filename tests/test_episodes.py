"""Batches laid out by hand, and how episodes are split into micro-batches."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lmdqn.episodes import MATCH_FEATURES, Episode, Example, SequenceFormat, demonstration, make_batch, micro_batches

PAD, EOS = 0, 2
APART = SequenceFormat(PAD, (EOS,), decoder_prefix=None, context_tokens=None)
SHARED = SequenceFormat(PAD, (EOS,), decoder_prefix=None, context_tokens=None, shares_prompts=True)
SEQ2SEQ = SequenceFormat(PAD, (EOS,), decoder_prefix=(8, 9), context_tokens=None)
LAYOUTS = pytest.mark.parametrize("layout", [APART, SHARED, SEQ2SEQ], ids=["apart", "shared", "seq2seq"])


def example(*prompt: int) -> Example:
    return Example("", (), prompt, (), "")


def terminal() -> Episode:
    """Three tokens, the last one EOS, after a prompt of two."""
    return Episode(example(10, 11), [20, 21, EOS], truncated=False, group=4, reward=1.0, baseline=0.25)


def truncated() -> Episode:
    """Two tokens, cut off, after the same prompt."""
    return Episode(example(10, 11), [22, 23], truncated=True, group=4, reward=0.5, baseline=0.75)


def other() -> Episode:
    """One token, EOS, after another prompt."""
    return Episode(example(12, 13, 14), [EOS], truncated=False, group=6, reward=0.125)


def rows(bits: Tensor) -> list[str]:
    """A mask as text: 1 where True."""
    return ["".join(str(int(bit)) for bit in row) for row in bits.tolist()]


# --- what all layouts have in common ------------------------------------------------------------------------------


@LAYOUTS
def test_responses_and_what_was_measured(layout: SequenceFormat) -> None:
    first, second, third = terminal(), truncated(), other()
    first.reference_log_probs = torch.tensor([-1.0, -2.0, -3.0])
    first.behaviour_log_probs = torch.tensor([-0.5, -0.25, -0.125])
    second.reference_log_probs = torch.tensor([-4.0, -5.0])
    third.match_features = torch.arange(2.0 * MATCH_FEATURES).reshape(2, MATCH_FEATURES)
    third.peers = 0.25
    batch = make_batch([first, third, second], layout)
    assert batch.response_ids.tolist() == [[20, 21, EOS], [EOS, PAD, PAD], [22, 23, PAD]]
    assert rows(batch.response_mask) == ["111", "100", "110"]
    assert rows(batch.state_mask) == ["1110", "1000", "1110"]  # s_n only where the response was cut off
    assert batch.rewards.tolist() == [[0.0, 0.0, 0.75], [0.125, 0.0, 0.0], [0.0, -0.25, 0.0]]
    assert batch.reference_log_probs.tolist() == [[-1.0, -2.0, -3.0], [0.0] * 3, [-4.0, -5.0, 0.0]]
    assert batch.behaviour_log_probs.tolist() == [[-0.5, -0.25, -0.125], [0.0] * 3, [0.0] * 3]
    assert batch.value_features.shape == (3, 4, MATCH_FEATURES + 1)
    assert torch.equal(batch.value_features[1, :2, :-1], third.match_features)
    assert batch.value_features[1, :, -1].tolist() == [0.25] * 4
    assert int((~batch.value_features.isnan()).sum()) == third.match_features.numel() + 4
    assert batch.groups.tolist() == [4, 6, 4]


def test_numbers_at_states_and_tokens() -> None:
    batch = make_batch([terminal(), truncated()], APART)
    flat = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert batch.actions.tolist() == [20, 21, EOS, 22, 23, PAD]  # the cut-off state has none: any id
    assert batch.at_states(flat).tolist() == [[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 0.0]]
    assert batch.at_tokens(flat).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 0.0]]


def test_a_batch_moves_whole() -> None:
    batch = make_batch([terminal(), truncated()], SEQ2SEQ).to(torch.device("meta"))
    moved = [value for value in vars(batch).values() if value is not None]
    assert len(moved) == len(vars(batch)) - 1  # no position ids
    assert {value.device.type for value in moved} == {"meta"}


def test_a_reference_as_an_episode() -> None:
    taught = Example("s", ("one", "two"), (10,), ((20, EOS), (21, 22)), "s")
    whole, cut = (demonstration(taught, k, 7, (3, EOS)) for k in (0, 1))
    assert (whole.response_ids, whole.truncated, whole.text) == ([20, EOS], False, "one")
    assert (cut.response_ids, cut.truncated, cut.text) == ([21, 22], True, "two")
    assert whole.demonstration
    assert whole.group == 7


# --- rows ---------------------------------------------------------------------------------------------------------


def test_causal_rows_apart() -> None:
    batch = make_batch([terminal(), other(), truncated()], APART)
    assert batch.decoder_ids.tolist() == [[10, 11, 20, 21, EOS], [12, 13, 14, EOS, PAD], [10, 11, 22, 23, PAD]]
    assert rows(batch.decoder_mask) == ["11111", "11110", "11110"]
    assert batch.position_ids is None
    # Each state stands at the token before its action: s_0 at the prompt's last one.
    assert batch.states.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [2, 1], [2, 2], [2, 3]]
    assert batch.encoder_ids is None
    assert batch.encoder_rows is None


def test_causal_row_shared_by_two_responses() -> None:
    batch = make_batch([terminal(), truncated()], SHARED)
    assert batch.decoder_ids.tolist() == [[10, 11, 20, 21, EOS, 22, 23]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3]]
    assert batch.decoder_mask.shape == (1, 1, 7, 7)
    assert rows(batch.decoder_mask[0, 0]) == [
        "1000000",  # the prompt
        "1100000",
        "1110000",  # the first response: prompt and itself
        "1111000",
        "1111100",
        "1100010",  # the second: prompt and itself, not the first
        "1100011",
    ]
    # Both responses begin in the same state, at the prompt's last token.
    assert batch.states.tolist() == [[0, 1], [0, 2], [0, 3], [0, 1], [0, 5], [0, 6]]


def test_shared_rows_of_differing_length() -> None:
    batch = make_batch([terminal(), other(), truncated()], SHARED)
    assert batch.decoder_ids.tolist() == [[10, 11, 20, 21, EOS, 22, 23], [12, 13, 14, EOS, PAD, PAD, PAD]]
    assert batch.position_ids is not None
    assert batch.position_ids[1, :4].tolist() == [0, 1, 2, 3]
    assert rows(batch.decoder_mask[1, 0, :4]) == ["1000000", "1100000", "1110000", "1111000"]
    assert batch.decoder_mask.any(-1).all()  # attention over nothing at all would be nan
    assert batch.states.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [0, 1], [0, 5], [0, 6]]


def test_single_responses_need_no_shared_row() -> None:
    batch, apart = (make_batch([terminal(), other()], layout) for layout in (SHARED, APART))
    assert batch.position_ids is None
    assert torch.equal(batch.decoder_ids, apart.decoder_ids)
    assert torch.equal(batch.decoder_mask, apart.decoder_mask)
    assert torch.equal(batch.states, apart.states)


@pytest.mark.parametrize(("tokens", "rows_of"), [(1, [4]), (2, [2, 2]), (3, [2, 2]), (4, [1, 1, 1, 1])])
def test_a_row_takes_responses_while_that_makes_them_cheaper(tokens: int, rows_of: list[int]) -> None:
    """After a prompt of 2, where all but attention costs as much as looking at 16 places: sqrt(2 (2 + 16)) = 6 tokens.

    Of four responses that is all, three, two or one; and three would leave one alone in a row as long.
    """
    layout = replace(SHARED, token_cost=16.0)
    batch = make_batch([Episode(example(10, 11), [20] * tokens, True, 4) for _ in range(4)], layout)
    assert batch.decoder_ids.shape == (len(rows_of), 2 + rows_of[0] * tokens)
    firsts = [[row, 2 + k * tokens] for row, count in enumerate(rows_of) for k in range(count)]
    assert batch.states.tolist()[1 :: tokens + 1] == firsts  # the state after each response's first token
    assert (batch.position_ids is None) == (rows_of[0] == 1)


def test_seq2seq_rows() -> None:
    batch = make_batch([terminal(), other(), truncated()], SEQ2SEQ)
    assert batch.decoder_ids.tolist() == [[8, 9, 20, 21, EOS], [8, 9, EOS, PAD, PAD], [8, 9, 22, 23, PAD]]
    assert rows(batch.decoder_mask) == ["11111", "11100", "11110"]
    assert batch.position_ids is None
    assert batch.states.tolist() == [[0, 1], [0, 2], [0, 3], [1, 1], [2, 1], [2, 2], [2, 3]]
    assert batch.encoder_ids is not None
    assert batch.encoder_mask is not None
    assert batch.encoder_rows is not None
    assert batch.encoder_ids.tolist() == [[10, 11, PAD], [12, 13, 14]]
    assert batch.encoder_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.encoder_rows.tolist() == [0, 1, 0]


def test_a_pad_token_that_is_also_eos_is_told_apart_by_length() -> None:
    batch = make_batch([terminal(), other()], SequenceFormat(EOS, (EOS,), None, None))
    assert batch.response_ids.tolist() == [[20, 21, EOS], [EOS, EOS, EOS]]
    assert rows(batch.response_mask) == ["111", "100"]
    assert rows(batch.decoder_mask) == ["11111", "11110"]


# --- micro-batches ------------------------------------------------------------------------------------------------


def group(number: int, prompt: int, *responses: int) -> list[Episode]:
    """A group by the lengths of its prompt and responses."""
    of_group = example(*range(100, 100 + prompt))
    return [Episode(of_group, [50] * length, truncated=True, group=number) for length in responses]


def lists(episodes: Sequence[Episode], layout: SequenceFormat, max_tokens: int) -> list[list[int]]:
    """The group numbers in each micro-batch."""
    batches = micro_batches(episodes, layout, max_tokens)
    return [list(dict.fromkeys(episode.group for episode in batch)) for batch in batches]


def padded_tokens(episodes: Sequence[Episode], layout: SequenceFormat) -> int:
    batch = make_batch(episodes, layout)
    return max(batch.decoder_ids.numel(), 0 if batch.encoder_ids is None else batch.encoder_ids.numel())


def test_micro_batches_by_hand() -> None:
    """Rows of 3 + 2 + 2 = 7, 1 + 2 + 1 = 4, 9 + 1 + 2 = 12 and 2 + 2 + 2 = 6 tokens; apart, 2 of 5, 3, 11 and 4."""
    episodes = [*group(0, 3, 2, 2), *group(1, 1, 2, 1), *group(2, 9, 1, 2), *group(3, 2, 2, 2)]
    assert lists(episodes, SHARED, 21) == [[1, 3, 0], [2]]
    assert lists(episodes, SHARED, 20) == [[1, 3], [0], [2]]
    assert lists(episodes, SHARED, 48) == [[1, 3, 0, 2]]
    assert lists(episodes, SHARED, 1) == [[1], [3], [0], [2]]
    assert lists(episodes, APART, 30) == [[1, 3, 0], [2]]
    assert lists(episodes, APART, 29) == [[1, 3], [0], [2]]


def random_groups(chance: random.Random, sizes: Sequence[int]) -> list[Episode]:
    """Twelve groups with prompts and responses of 1 to 20 tokens; `sizes` are the numbers of responses there may be."""
    return [
        episode
        for number in range(12)
        for episode in group(
            number, chance.randint(1, 20), *(chance.randint(1, 20) for _ in range(chance.choice(sizes)))
        )
    ]


@LAYOUTS
def test_micro_batches_keep_groups_whole_and_lose_nothing(layout: SequenceFormat) -> None:
    for trial in range(20):
        chance = random.Random(trial)
        episodes = random_groups(chance, (1, 2, 3, 4))
        chance.shuffle(episodes)
        batches = micro_batches(episodes, layout, chance.randint(20, 300))
        assert sorted(id(e) for batch in batches for e in batch) == sorted(id(e) for e in episodes)
        assert sum(len({e.group for e in batch}) for batch in batches) == 12


def test_micro_batches_go_from_small_groups_to_large() -> None:
    for trial in range(20):
        episodes = random_groups(random.Random(trial), (3,))
        size = {episode.group: len(episode.example.prompt_ids) for episode in episodes}
        for episode in episodes:
            size[episode.group] += len(episode.response_ids)
        sizes = [size[number] for numbers in lists(episodes, SHARED, 150) for number in numbers]
        assert sizes == sorted(sizes)
        assert len(sizes) == 12


@LAYOUTS
@pytest.mark.parametrize("equal_groups", [True, False], ids=["equal groups", "groups of any size"])
def test_micro_batches_respect_the_limit_unless_one_group_alone_exceeds_it(
    layout: SequenceFormat, equal_groups: bool
) -> None:
    """References are groups of any size; so are samples with as many demonstrations as there are."""
    for trial in range(100):
        chance = random.Random(trial)
        limit = chance.randint(20, 300)
        episodes = random_groups(chance, (3,) if equal_groups else (1, 2, 3, 4, 5))
        for batch in micro_batches(episodes, layout, limit):
            assert len({e.group for e in batch}) == 1 or padded_tokens(batch, layout) <= limit
