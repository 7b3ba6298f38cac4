"""What travels through the loop: examples, episodes and batches, every tensor with its shape.

B is episodes in a batch, T the longest response in it, L the longest decoder row, S the longest encoder row, N the
number of states whose Q-values are needed. A response of n tokens has the states s_0 .. s_{n-1}, in which
its tokens were chosen, and s_n, the state after the last one. s_n is terminal when the last token is an EOS.
A response cut off at the length limit is *truncated*: its s_n is not terminal, and its value is bootstrapped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MATCH_FEATURES = 9  # numbers a state that say how the response so far matches the references
VALUE_FEATURES = MATCH_FEATURES + 1  # what the value head sees beside the hidden state: those, and `peers`


@dataclass(frozen=True)
class Example:
    """One source with its references, and the prompt as the model reads it."""

    source: str
    references: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    reference_ids: tuple[tuple[int, ...], ...]  # each ends in EOS, unless it was cut at the length limit
    prompt: str
    task: str = ""  # its name, where the recipe has several


@dataclass
class Episode:
    """One response to one prompt, with what was measured when it was made."""

    example: Example
    response_ids: list[int]
    truncated: bool
    group: int  # episodes of one prompt drawn together share it
    demonstration: bool = False
    behaviour_log_probs: Tensor | None = None  # (n,) nats, of the distribution each token was sampled from
    reference_log_probs: Tensor | None = None  # (n,) nats, under the frozen reference network
    first_log_probs: Tensor | None = None  # (n,) nats, under the first reference, where references are reset
    match_features: Tensor | None = None  # (n + 1, MATCH_FEATURES), for the value head in training
    text: str = ""
    reward: float = 0.0
    terms: dict[str, float] = field(default_factory=dict)  # the reward's parts, unweighted
    baseline: float = 0.0  # what the reward is centred by
    peers: float | None = None  # mean reward of the prompt's other samples, where the value head may know it
    weight: float = 1.0  # of its residuals in the batch it was last drawn into


@dataclass
class Batch:
    """Episodes as right-padded tensors.

    For a causal model the decoder reads prompt + response; for a seq2seq model the encoder reads the prompt and
    the decoder its start tokens + response. What stands before the response is the *prefix*.

    Episodes of one prompt share the work on it where the model allows: a causal row is then
    prompt + response 1 + response 2 + ..., with a mask and positions that let each response see the prompt and
    itself alone; a seq2seq model encodes each prompt once. R is decoder rows, G encoder rows.
    """

    decoder_ids: Tensor  # (R, L) int64
    decoder_mask: Tensor  # (R, L) bool, True on real tokens; (R, 1, L, L) bool where responses share a row
    position_ids: Tensor | None  # (R, L) int64, only where responses share a row
    states: Tensor  # (N, 2) int64, row and position of each state in `state_mask`, episode by episode
    response_ids: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, EOS included
    state_mask: Tensor  # (B, T + 1) bool, states with Q-values: all but terminal ones and padding
    rewards: Tensor  # (B, T) reward of each token, centred by the baseline
    reference_log_probs: Tensor  # (B, T) nats
    behaviour_log_probs: Tensor  # (B, T) nats
    value_features: Tensor  # (B, T + 1, VALUE_FEATURES), NaN where not measured
    groups: Tensor  # (B,) int64
    weights: Tensor  # (B,) what each episode's residuals weigh
    demonstrations: Tensor  # (B,) bool, references and not samples
    encoder_ids: Tensor | None = None  # (G, S) int64, seq2seq only
    encoder_mask: Tensor | None = None  # (G, S) int64
    encoder_rows: Tensor | None = None  # (R,) int64, the encoder row that each decoder row reads

    def to(self, device: torch.device) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t.to(device) for name, t in moved.items() if t is not None})

    @property
    def actions(self) -> Tensor:
        """(N,) the token chosen in each state; after a truncated response, where none was, any valid id."""
        return torch.nn.functional.pad(self.response_ids, (0, 1))[self.state_mask]

    @property
    def acting(self) -> Tensor:
        """(N,) True for states in which a token was chosen: all but those after a truncated response."""
        return torch.nn.functional.pad(self.response_mask, (0, 1))[self.state_mask]

    def at_states(self, flat: Tensor) -> Tensor:
        """Lay out one number for each state: (N,) -> (B, T + 1), zero in terminal states and padding."""
        grid = torch.zeros(self.state_mask.shape, device=flat.device, dtype=flat.dtype)
        return grid.masked_scatter(self.state_mask, flat)

    def at_tokens(self, flat: Tensor) -> Tensor:
        """Lay out one number for each chosen token: (N,) -> (B, T), zero on padding."""
        return self.at_states(flat)[:, :-1] * self.response_mask


@dataclass(frozen=True)
class SequenceFormat:
    """How a model's sequences are laid out: the facts about model and tokenizer that batches and decoding need."""

    pad_id: int
    eos_ids: tuple[int, ...]  # any of them ends a response; the first one ends references
    decoder_prefix: tuple[int, ...] | None  # seq2seq: what the decoder starts from; causal: None
    context_tokens: int | None  # longest sequence the model takes; None where there is no limit
    shares_prompts: bool = False  # causal: responses to one prompt may share a row of a batch
    token_cost: float = math.inf  # work on a token apart from attention, in places that it could attend to for it

    @property
    def is_seq2seq(self) -> bool:
        return self.decoder_prefix is not None


def demonstration(example: Example, reference: int, group: int, eos_ids: Sequence[int]) -> Episode:
    """The example's reference number `reference` as an episode."""
    ids = list(example.reference_ids[reference])
    return Episode(
        example,
        ids,
        truncated=ids[-1] not in eos_ids,
        group=group,
        demonstration=True,
        text=example.references[reference],
    )


def shortest_episode(examples: Sequence[Example], layout: SequenceFormat) -> Episode:
    """The least that a network can be given: the shortest prompt, and an empty response."""
    return Episode(min(examples, key=lambda e: len(e.prompt_ids)), [layout.eos_ids[0]], truncated=False, group=0)


def make_batch(episodes: Sequence[Episode], layout: SequenceFormat) -> Batch:
    """Pad episodes into one batch on the CPU. The whole centred reward falls on each response's last token."""
    response_ids, response_mask = _pad([e.response_ids for e in episodes], layout.pad_id)
    lengths = response_mask.sum(1)  # (B,)
    truncated = torch.tensor([e.truncated for e in episodes])
    time = torch.arange(response_ids.shape[1] + 1)
    state_mask = time < (lengths + truncated)[:, None]
    rewards = torch.zeros(response_ids.shape)
    rewards[torch.arange(len(episodes)), lengths - 1] = torch.tensor([e.reward - e.baseline for e in episodes])
    rows = _rows(episodes, layout)
    decoder_ids, decoder_mask, position_ids, places = _decoder_rows(episodes, rows, layout)
    batch = Batch(
        decoder_ids=decoder_ids,
        decoder_mask=decoder_mask,
        position_ids=position_ids,
        states=_state_places(places, state_mask),
        response_ids=response_ids,
        response_mask=response_mask.bool(),
        state_mask=state_mask,
        rewards=rewards,
        reference_log_probs=_pad_measured([e.reference_log_probs for e in episodes], response_ids.shape),
        behaviour_log_probs=_pad_measured([e.behaviour_log_probs for e in episodes], response_ids.shape),
        value_features=_value_features(episodes, state_mask.shape),
        groups=torch.tensor([e.group for e in episodes]),
        weights=torch.tensor([e.weight for e in episodes]),
        demonstrations=torch.tensor([e.demonstration for e in episodes]),
    )
    if layout.is_seq2seq:
        encoder_rows = _members(episodes)
        prompts = [list(episodes[members[0]].example.prompt_ids) for members in encoder_rows]
        batch.encoder_ids, batch.encoder_mask = _pad(prompts, layout.pad_id)
        batch.encoder_rows = torch.empty(len(episodes), dtype=torch.int64)
        for row, members in enumerate(encoder_rows):
            batch.encoder_rows[members] = row
    return batch


def micro_batches(episodes: Sequence[Episode], layout: SequenceFormat, max_tokens: int) -> list[list[Episode]]:
    """Split episodes into lists of at most `max_tokens` padded tokens, similar lengths together, groups whole.

    A group that alone is over the limit makes a list of its own.
    """
    shaped = [(_shape(group, layout), group) for group in by_group(episodes)]
    shaped.sort(key=lambda pair: _padded_tokens([pair[0]]))
    batches: list[list[tuple[_Shape, list[Episode]]]] = []
    for shape, group in shaped:
        if batches and _padded_tokens([*(known for known, _ in batches[-1]), shape]) <= max_tokens:
            batches[-1].append((shape, group))
        else:
            batches.append([(shape, group)])
    return [[episode for _, group in batch for episode in group] for batch in batches]


def by_group(episodes: Sequence[Episode]) -> list[list[Episode]]:
    """The episodes of each group, in order of first appearance."""
    return [[episodes[i] for i in members] for members in _members(episodes)]


def _members(episodes: Sequence[Episode]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i, episode in enumerate(episodes):
        groups.setdefault(episode.group, []).append(i)
    return list(groups.values())


class _Shape(NamedTuple):
    """What a group takes in a batch."""

    rows: int  # of the decoder
    row_tokens: int  # of the longest
    encoder_tokens: int  # in the encoder, where all its responses share a row; causal: none


def _shape(group: Sequence[Episode], layout: SequenceFormat) -> _Shape:
    rows = _rows(group, layout)
    longest = max(sum(len(group[i].response_ids) for i in members) for members in rows)
    prompt = len(group[0].example.prompt_ids)
    if layout.decoder_prefix is not None:
        return _Shape(len(rows), len(layout.decoder_prefix) + longest, prompt)
    return _Shape(len(rows), prompt + longest, 0)


def _padded_tokens(shapes: Sequence[_Shape]) -> int:
    """Tokens of groups as one batch, padding included; encoder and decoder together."""
    rows, row_tokens, encoder_tokens = zip(*shapes, strict=True)
    return max(row_tokens) * sum(rows) + max(encoder_tokens) * len(shapes)


def _rows(episodes: Sequence[Episode], layout: SequenceFormat) -> list[list[int]]:
    """Which episodes stand in each row: one, or some of a group, or all of it.

    A row of n responses of T tokens after a prompt of P costs (P + n T) (c + P + n T), with c = `token_cost`, as every
    token looks at the whole row. A response then costs least where n T = sqrt(P (P + c)).
    """
    if not layout.shares_prompts:
        return [[i] for i in range(len(episodes))]
    rows = []
    for members in _members(episodes):
        prompt = len(episodes[members[0]].example.prompt_ids)
        mean = sum(len(episodes[i].response_ids) for i in members) / len(members)
        most = min(len(members), max(1.0, math.sqrt(prompt * (prompt + layout.token_cost)) / mean))
        count = math.ceil(len(members) / int(most))
        each = math.ceil(len(members) / count)
        rows += [members[first : first + each] for first in range(0, len(members), each)]
    return rows


def _decoder_rows(
    episodes: Sequence[Episode], rows: list[list[int]], layout: SequenceFormat
) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[int, int, int]]]:
    """Decoder ids, mask and positions; and for each episode its row, its prefix's last place, its response's first."""
    ids, segments, positions = [], [], []
    places = [(0, 0, 0)] * len(episodes)
    for row, members in enumerate(rows):
        prefix = list(layout.decoder_prefix or episodes[members[0]].example.prompt_ids)
        row_ids, row_segments, row_positions = list(prefix), [0] * len(prefix), list(range(len(prefix)))
        for number, i in enumerate(members, start=1):
            response = episodes[i].response_ids
            places[i] = (row, len(prefix) - 1, len(row_ids))
            row_ids += response
            row_segments += [number] * len(response)
            row_positions += range(len(prefix), len(prefix) + len(response))
        ids.append(row_ids)
        segments.append(row_segments)
        positions.append(row_positions)
    decoder_ids, real = _pad(ids, layout.pad_id)
    if all(len(members) == 1 for members in rows):
        return decoder_ids, real.bool(), None, places
    segment, _ = _pad(segments, -1)
    return decoder_ids, _sharing_mask(segment), _pad(positions, 0)[0], places


def _sharing_mask(segment: Tensor) -> Tensor:
    """(R, L) segment of each token, 0 the prompt and -1 padding -> (R, 1, L, L) who sees whom."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = segment[:, :, None] == segment[:, None, :]
    prompt = segment[:, None, :] == 0
    return (causal & (same | prompt))[:, None]


def _state_places(places: list[tuple[int, int, int]], state_mask: Tensor) -> Tensor:
    """(N, 2) row and position where each state's hidden vector stands: that of the token before the action."""
    episode, t = state_mask.nonzero(as_tuple=True)
    row, prefix_last, response_first = torch.tensor(places)[episode].unbind(1)
    return torch.stack([row, torch.where(t == 0, prefix_last, response_first + t - 1)], dim=1)


def _pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(rows, longest) ids padded on the right, and the int64 mask of real tokens."""
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(t) for t in tensors], batch_first=True)
    return ids, mask


def _value_features(episodes: Sequence[Episode], shape: tuple[int, ...]) -> Tensor:
    features = torch.full((*shape, VALUE_FEATURES), torch.nan)
    features[..., MATCH_FEATURES] = torch.tensor([torch.nan if e.peers is None else e.peers for e in episodes])[:, None]
    for i, episode in enumerate(episodes):
        if episode.match_features is not None:
            features[i, : len(episode.match_features), :MATCH_FEATURES] = episode.match_features
    return features


def _pad_measured(rows: list[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor of that shape with a row an episode, zero where nothing was measured."""
    padded = torch.zeros(shape)
    for i, row in enumerate(rows):
        if row is not None:
            padded[i, : len(row)] = row
    return padded
