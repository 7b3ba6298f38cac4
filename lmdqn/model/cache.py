"""A decoding cache with room to grow: to append a token copies that token, and not all that was read before."""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

ROOM = 32  # tokens of each response made room for at a time


def make_room(cache: Cache | None) -> None:
    """Let the self-attention layers of a cache grow in place; layers of other kinds stay as they are."""
    grows = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if isinstance(grows, DynamicCache):
        grows.layers = [RoomyLayer(layer) if _is_plain(layer) else layer for layer in grows.layers]


def can_part(cache: Cache | None) -> bool:
    """Whether all that the cache keeps is in layers of `make_room`, which `RoomyLayer.part` can take apart."""
    return isinstance(cache, DynamicCache) and all(isinstance(layer, RoomyLayer) for layer in cache.layers)


def _is_plain(layer: Any) -> bool:
    """Neither of another kind, nor empty (as where layers share what they keep)."""
    return type(layer) is DynamicLayer and layer.is_initialized


class RoomyLayer(DynamicLayer):
    """transformers' `DynamicLayer`, whose keys and values (B, heads, L, D) are views of longer tensors."""

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._roomy = layer.keys, layer.values  # what they are views of

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, n, D) of n tokens; gives those of all."""
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if after > self._roomy[0].shape[-2]:
            room = after + ROOM * key_states.shape[-2]
            self._roomy = _with_room(self.keys, room), _with_room(self.values, room)
        for whole, new in zip(self._roomy, (key_states, value_states), strict=True):
            whole[:, :, before:after] = new
        self._look_into(*self._roomy, after)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row as often, one after the other."""
        super().batch_repeat_interleave(repeats)
        self._roomy = self.keys, self.values

    def part(self, rows: Tensor, columns: Tensor, prompt: int, width: int) -> None:
        """A row for each of (rows, columns), where `width` responses to one prompt had shared one.

        In it a token of each response followed the `prompt` tokens, then another of each, and so on.
        """
        keys, values = (_parted(states, rows, columns, prompt, width) for states in (self.keys, self.values))
        self._look_into(keys, values, keys.shape[-2] - ROOM)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows go on; their room comes along, as to make it anew would copy all once more."""
        keys, values = self._roomy
        self._look_into(keys[indices], values[indices], self.keys.shape[-2])

    def _look_into(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Keys and values are the first tokens of these."""
        self._roomy = keys, values
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]


def _parted(states: Tensor, rows: Tensor, columns: Tensor, prompt: int, width: int) -> Tensor:
    """(B, heads, prompt + width n, D) -> (len(rows), heads, prompt + n + ROOM, D)."""
    written = states[:, :, prompt:].unflatten(2, (-1, width))[rows, :, :, columns]  # (len(rows), heads, n, D)
    end = prompt + written.shape[2]
    roomy = states.new_empty(len(rows), states.shape[1], end + ROOM, states.shape[-1])
    roomy[:, :, :prompt], roomy[:, :, prompt:end] = states[rows, :, :prompt], written
    return roomy


def _with_room(states: Tensor, tokens: int) -> Tensor:
    """A copy of the start of a longer tensor, (B, heads, tokens, D)."""
    roomy = states.new_empty(*states.shape[:2], tokens, states.shape[-1])
    roomy[:, :, : states.shape[-2]] = states
    return roomy
