"""An update of the default loss against a step of transformers' Trainer, and with torch.compile against without."""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

from speed.against_trainer import ON_ONE_CORE, update_and_step, update_of
from speed.material import groups_of_references, loaded_model, pairs, texts_of, tokens_of
from speed.table import Line, Settings, compare

SIZES = (160, 3, 1500), (256, 6, 8000)  # width, layers, vocabulary


def update(settings: Settings) -> Iterator[Line]:
    """One update of the default loss on 16 groups of 4 against one step of transformers' Trainer on their tokens."""
    yield from _updates(settings, SIZES, 16)


def update_60m(settings: Settings) -> Iterator[Line]:
    """The same on 4 groups of 4, a step taking seconds."""
    yield from _updates(settings, ((640, 8, 32000),), 4)


def _updates(settings: Settings, sizes: Iterable[tuple[int, int, int]], groups: int) -> Iterator[Line]:
    """Of models of those widths, layers and vocabularies."""
    texts = texts_of(settings.data)
    for width, layers, vocabulary in sizes:
        for lora in (False, True):
            loaded = loaded_model(texts, width, layers, vocabulary, lora)
            episodes = groups_of_references(pairs(settings.data, groups, 4), loaded)
            turns = settings.alternate(*update_and_step(loaded, episodes, settings))
            fast, slow = ([tokens_of(episodes) / took for took in side] for side in turns)
            name = f"update against Trainer's SFT step, {_size(loaded, lora)}"
            yield compare(name, fast, slow, "tokens/s", ">= 0.9")


def compiled(settings: Settings) -> Iterator[Line]:
    """The same updates with optimisation.torch_compile against those without; seconds are to the first one's end."""
    texts = texts_of(settings.data)
    for width, layers, vocabulary in SIZES:
        for lora in (False, True):
            loaded = loaded_model(texts, width, layers, vocabulary, lora)
            episodes = groups_of_references(pairs(settings.data, 16, 4), loaded)
            plain = update_of(deepcopy(loaded), episodes, ON_ONE_CORE)
            began = settings.clock()
            fast = update_of(loaded, episodes, replace(ON_ONE_CORE, torch_compile=True))
            fast()
            compiling_s = settings.clock() - began
            turns = settings.alternate(partial(settings.seconds, fast), partial(settings.seconds, plain))
            name = f"update with torch.compile ({compiling_s:.0f} s at first) against without, {_size(loaded, lora)}"
            ours, theirs = ([tokens_of(episodes) / took for took in side] for side in turns)
            yield compare(name, ours, theirs, "tokens/s", "")


def checkpointed(settings: Settings) -> Iterator[Line]:
    """The same updates with optimisation.gradient_checkpointing against those without."""
    texts = texts_of(settings.data)
    for width, layers, vocabulary in SIZES:
        loaded = loaded_model(texts, width, layers, vocabulary)
        episodes = groups_of_references(pairs(settings.data, 16, 4), loaded)
        plain = update_of(deepcopy(loaded), episodes, ON_ONE_CORE)
        again = update_of(loaded, episodes, replace(ON_ONE_CORE, gradient_checkpointing=True))
        turns = settings.alternate(partial(settings.seconds, again), partial(settings.seconds, plain))
        ours, theirs = ([tokens_of(episodes) / took for took in side] for side in turns)
        name = f"update with gradient_checkpointing against without, {_size(loaded, lora=False)}"
        yield compare(name, ours, theirs, "tokens/s", "")


def _size(loaded: Any, lora: bool) -> str:
    return f"{sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f}M{' LoRA' if lora else ''}"
