"""Models reading token by token, and the one loop that decodes by what they say: causal and seq2seq."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from lmdqn.episodes import SequenceFormat
from lmdqn.model.cache import can_part, make_room

Choose = Callable[..., Tensor]  # which rows (b,), logits (b, V) of each reader -> a token a row, (b,)
Active = Callable[[], AbstractContextManager[Any]]  # the model, with the adapter that is meant
CROWDED = 0.75  # share of a batch that still goes on, below which the others leave: to leave copies the whole cache
CROWDED_TOGETHER = 0.5  # the same where responses share their prompt's row, of which each then gets a copy
MOST_KEYS = 4  # in a shared row, over those that a response sees there: the others' are masked, but computed


def greedy(rows: Tensor, logits: Tensor) -> Tensor:
    """The likeliest token of each row."""
    return logits.float().argmax(-1)


@torch.no_grad()
def decode(
    models: Sequence[Active],
    layout: SequenceFormat,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_tokens: int,
    choose: Choose,
) -> list[list[int]]:
    """Response ids up to and including the first EOS, `samples` of them for each prompt in turn.

    All models read what is written, and `choose` is given what each says of the next token. A prompt is read once
    for all its samples, which share its row where the model lets them; rows that have ended leave the batch and the
    cache, many at a time. What transformers' `generate` does besides costs more than a small model's own work on a CPU.
    """
    readers = [Reader.of(model, layout, prompts, max_tokens) for model in models]
    logits = [reader.start(samples) for reader in readers]
    device = logits[0].device
    rows = torch.arange(len(logits[0]), device=device)  # those in the batch
    going_on = rows  # the places in it of those not at their end
    last = torch.full_like(rows, layout.pad_id)  # token of each row in the batch
    eos_ids = torch.tensor(layout.eos_ids, device=device)
    responses: list[list[int]] = [[] for _ in range(len(rows))]
    for step in range(max_tokens):
        tokens = choose(rows[going_on], *(of_all[going_on] for of_all in logits))
        for row, token in zip(rows[going_on].tolist(), tokens.tolist(), strict=True):
            responses[row].append(token)
        last[going_on] = tokens
        going_on = going_on[~torch.isin(tokens, eos_ids)]
        if len(going_on) == 0 or step + 1 == max_tokens:
            break
        if len(going_on) <= min(reader.crowded for reader in readers) * len(rows):
            rows, last = rows[going_on], last[going_on]
            for reader in readers:
                reader.keep(going_on)
            going_on = torch.arange(len(rows), device=device)
        logits = [reader.read(last) for reader in readers]
    return responses


@torch.no_grad()
def beam_search(
    model: Any, layout: SequenceFormat, prompts: Sequence[Sequence[int]], beams: int, max_tokens: int
) -> list[list[int]]:
    """Response ids up to and including the first EOS, by transformers' own beam search."""
    device = next(model.parameters()).device
    ids, mask = (t.to(device) for t in _padded(layout, prompts))
    skip = ids.shape[1]
    given = {"input_ids": ids, "attention_mask": mask}
    if layout.decoder_prefix is not None:
        given["decoder_input_ids"] = torch.tensor([layout.decoder_prefix], device=device).expand(len(prompts), -1)
        skip = len(layout.decoder_prefix)
    written = model.generate(**given, max_new_tokens=max_tokens, num_beams=beams)[:, skip:].tolist()
    ends = [next((n for n, token in enumerate(row, 1) if token in layout.eos_ids), len(row)) for row in written]
    return [row[:end] for row, end in zip(written, ends, strict=True)]


def _padded(layout: SequenceFormat, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(B, longest) ids and mask; a causal model goes on from the right end, so its padding is on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), layout.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if layout.is_seq2seq else slice(longest - len(prompt), None)
        ids[row, where] = torch.tensor(prompt)
        mask[row, where] = 1
    return ids, mask


@dataclass
class Reader:
    """What a model has read, row by row, and how it reads on."""

    active: Active
    takes: frozenset[str]  # the names of its forward's arguments
    ids: Tensor  # (B, L) what the decoder is about to read; without a cache, all that it has read too
    mask: Tensor  # (B, P) of the prompt, padding excluded: a causal model's, or the encoder's
    encoded: Tensor | None  # (B, P, H) seq2seq only
    added: Tensor | None = (
        None  # (B, 1, width, P + width room) what is added to a causal model's scores, if it takes it
    )
    width: int = 1  # responses that share a row of the batch, which then reads a token of each at a time
    length: int = 0  # tokens read of each response, the prompt's, padding and the decoder's start included
    cache: Any = None

    @classmethod
    def of(cls, active: Active, layout: SequenceFormat, prompts: Sequence[Sequence[int]], room: int) -> "Reader":
        """Nothing is read yet; there is to be room for so many tokens after the prompts."""
        ids, mask = _padded(layout, prompts)
        with active() as model:
            device = next(model.parameters()).device
            ids, mask = ids.to(device), mask.to(device)
            plain = model.get_base_model() if hasattr(model, "peft_config") else model
            takes = frozenset(inspect.signature(plain.forward).parameters)
            if layout.decoder_prefix is not None:
                encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
                prefix = torch.tensor([layout.decoder_prefix], device=device).expand(len(prompts), -1)
                return cls(active, takes, prefix, mask, encoded)
            added = None
            if layout.shares_prompts:  # then the model takes such a mask, and need not make one for every token
                hidden = torch.nn.functional.pad(mask == 0, (0, room))[:, None, None]
                added = torch.zeros(hidden.shape, dtype=model.dtype, device=device)
                added.masked_fill_(hidden, torch.finfo(model.dtype).min)
        return cls(active, takes, ids, mask, None, added)

    def start(self, samples: int) -> Tensor:
        """Read the prompts; from here on each has `samples` responses, one after the other: (B, V) logits.

        Where the model lets them, they share their prompt's row, and what was read of it is neither copied nor read as
        often by attention.
        """
        logits = self._forward()
        make_room(self.cache)
        if samples == 1:
            return logits
        if self.added is not None and can_part(self.cache):
            self.width, self.added = samples, _own_columns(self.added, self.mask.shape[1], samples)
            return logits.repeat_interleave(samples, 0)
        self._each(lambda rows: rows.repeat_interleave(samples, 0))
        if self.cache is not None:
            self.cache.batch_repeat_interleave(samples)
        return logits.repeat_interleave(samples, 0)

    def read(self, tokens: Tensor) -> Tensor:
        """Read a token of each response: (B, V) logits of the next."""
        new = tokens.view(-1, self.width)
        self.ids = new if self.cache is not None else torch.cat([self.ids, new], dim=1)
        return self._forward()

    @property
    def crowded(self) -> float:
        """Share of the responses that still go on, below which `keep` pays."""
        if self.width == 1:
            return CROWDED
        return CROWDED_TOGETHER if self._keys <= MOST_KEYS * self.length else 1.0

    @property
    def _keys(self) -> int:
        """Tokens that have been read in a causal model's row, those of all its responses."""
        prompt = self.mask.shape[1]
        return prompt + self.width * (self.length - prompt)

    def keep(self, rows: Tensor) -> None:
        """Only these responses go on; each has a row of its own then."""
        if self.width > 1:
            self._part(rows)
            return
        self._each(lambda of_all: of_all[rows])
        if self.cache is not None:
            self.cache.batch_select_indices(rows)

    def _part(self, responses: Tensor) -> None:
        """A row for each of these, where rows were shared."""
        assert self.added is not None
        rows, columns = responses // self.width, responses % self.width
        prompt, room = self.mask.shape[1], self.added.shape[-1] - self.mask.shape[1]
        self.added = torch.nn.functional.pad(self.added[..., :1, :prompt], (0, room // self.width))
        self._each(lambda of_all: of_all[rows])
        for layer in self.cache.layers:
            layer.part(rows, columns, prompt, self.width)
        self.width = 1

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of everything but the cache."""
        self.ids, self.mask = change(self.ids), change(self.mask)
        self.encoded, self.added = (None if t is None else change(t) for t in (self.encoded, self.added))

    def _forward(self) -> Tensor:
        count = self.ids.shape[1] // self.width
        self.length = count if self.cache is None else self.length + count
        given: dict[str, Any] = {"use_cache": True}
        if "past_key_values" in self.takes:  # a recurrent model keeps no such cache: it reads everything again
            given["past_key_values"] = self.cache
        if "logits_to_keep" in self.takes:
            given["logits_to_keep"] = self.width
        if self.encoded is not None:
            given |= {"encoder_outputs": BaseModelOutput(last_hidden_state=self.encoded), "attention_mask": self.mask}
            given["decoder_input_ids"] = self.ids
        else:
            given |= {"input_ids": self.ids, "attention_mask": self._causal_mask()}
            if "position_ids" in self.takes:
                padding = self.mask.shape[1] - self.mask.sum(1, keepdim=True)  # (B, 1)
                places = torch.arange(self.length - count, self.length, device=padding.device)
                given["position_ids"] = (places - padding).clamp(min=0).repeat_interleave(self.width, 1)
        with self.active() as model:
            output = model(**given)
        if "past_key_values" in self.takes:
            self.cache = output.past_key_values
        return output.logits[:, -self.width :].flatten(0, 1)

    def _causal_mask(self) -> Tensor:
        """(B, L) of all that is read, or for one more token of each (B, 1, width, L) what is added to its scores."""
        if self.added is not None and self.cache is not None:
            return self.added[..., : self._keys]
        return torch.nn.functional.pad(self.mask, (0, self.length - self.mask.shape[1]), value=1)


def _own_columns(added: Tensor, prompt: int, width: int) -> Tensor:
    """(B, 1, 1, prompt + room) -> (B, 1, width, prompt + width room): each response sees the prompt and itself."""
    own = torch.eye(width, dtype=torch.bool, device=added.device).repeat(1, added.shape[-1] - prompt)
    others = torch.zeros_like(own, dtype=added.dtype).masked_fill_(~own, torch.finfo(added.dtype).min)
    return torch.cat([t.expand(len(added), 1, width, -1) for t in (added[..., :prompt], others)], dim=-1)
