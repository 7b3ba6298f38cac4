"""A decoding cache with room to grow: to append a token copies that token, and not all that was read before."""

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

ROOM = 32  # tokens made room for at a time


def make_room(cache: Cache | None) -> None:
    """Let the self-attention layers of a cache grow in place; layers of other kinds stay as they are."""
    grows = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if isinstance(grows, DynamicCache):
        grows.layers = [RoomyLayer(layer) if _is_plain(layer) else layer for layer in grows.layers]


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
            self._roomy = _with_room(self.keys, after + ROOM), _with_room(self.values, after + ROOM)
        for whole, new in zip(self._roomy, (key_states, value_states), strict=True):
            whole[:, :, before:after] = new
        self.keys, self.values = (whole[:, :, :after] for whole in self._roomy)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row as often, one after the other."""
        super().batch_repeat_interleave(repeats)
        self._roomy = self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows go on."""
        super().batch_select_indices(indices)
        self._roomy = self.keys, self.values


def _with_room(states: Tensor, tokens: int) -> Tensor:
    """A copy of the start of a longer tensor, (B, heads, tokens, D)."""
    roomy = states.new_empty(*states.shape[:2], tokens, states.shape[-1])
    roomy[:, :, : states.shape[-2]] = states
    return roomy
