"""How the time of an update grows, and that of an SFT step beside it."""

import math
import statistics
from collections.abc import Callable, Iterator

from speed.against_trainer import update_and_step
from speed.material import groups_of_random_words, loaded_model, texts_of
from speed.table import Line, Settings

PROMPT_TOKENS = 20
GROWTH = {"groups": (8, 16, 32), "response tokens": (16, 32, 64, 128), "vocabulary": (2000, 4000, 8000)}
USUAL = {"groups": 16, "response tokens": 32, "vocabulary": 1500}


def growth(settings: Settings) -> Iterator[Line]:
    """As batch, length and vocabulary grow: the exponent of time fitted over the sizes; 1 is linear."""
    texts = texts_of(settings.data)
    for name, sizes in GROWTH.items():
        both = [_update_and_step(texts, USUAL | {name: size}, settings) for size in sizes]
        turns = [[(ours(), theirs()) for ours, theirs in both] for _ in range(settings.repeats + 1)][1:]
        shown = []
        for times in zip(*turns, strict=True):  # of a size
            shown.append(tuple(1000 * statistics.median(side) for side in zip(*times, strict=True)))
        ours_ms, theirs_ms = (", ".join(f"{ms:.0f}" for ms in side) + " ms" for side in zip(*shown, strict=True))
        ours, theirs = ([_exponent(sizes, [side[i] for side in turn]) for turn in turns] for i in range(2))
        what = f"update as {name} grow: {', '.join(map(str, sizes))}"
        yield Line(f"{what}; an SFT step: exponent {statistics.median(theirs):.2f}", ours_ms, theirs_ms, ours, "<= 1")


def _update_and_step(
    texts: list[str], sizes: dict[str, int], settings: Settings
) -> tuple[Callable[[], float], Callable[[], float]]:
    """On groups of four responses of one length."""
    loaded = loaded_model(texts, 160, 3, sizes["vocabulary"])
    episodes = groups_of_random_words(sizes["groups"], PROMPT_TOKENS, sizes["response tokens"])
    return update_and_step(loaded, episodes, settings)


def _exponent(sizes: tuple[int, ...], times: list[float]) -> float:
    logs = [math.log(size) for size in sizes]
    return statistics.linear_regression(logs, [math.log(time) for time in times]).slope
