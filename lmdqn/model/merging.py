"""A LoRA adapter as part of the weights that it adapts, while nothing but decoding is asked of the model."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def adapter_merged(model: Any, adapter: str) -> Iterator[None]:
    """While inside, weights hold the adapter's update, and decoding costs what it does without an adapter.

    They come back bit by bit, from a copy in the host's memory: to subtract the update would leave rounding errors, and
    these add up. Layers that PEFT merges otherwise, and those that share their weight (a tied LM head), add the update
    themselves, as outside.
    """
    layers = _mergeable(model)
    before = [layer.base_layer.weight.to("cpu", copy=True) for layer in layers]
    try:
        for layer in layers:
            layer.merge(adapter_names=[adapter])
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.base_layer.weight.copy_(weight)
                layer.merged_adapters.clear()


def _mergeable(model: Any) -> list[Any]:
    """The adapted linear layers whose weight is theirs alone."""
    from peft.tuners.lora import Linear

    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    linear = [module for module in model.modules() if isinstance(module, Linear)]
    return [layer for layer in linear if owners[id(layer.base_layer.weight)] == 1]
