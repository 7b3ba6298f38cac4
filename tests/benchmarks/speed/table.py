"""A line of the table, and how the two sides of it take turns."""

import gc
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Line(NamedTuple):
    """A line of the table. Ratios are ours to theirs in the direction the bar names."""

    what: str
    ours: str
    theirs: str
    ratios: list[float]
    bar: str

    def __str__(self) -> str:
        spread = f"{statistics.median(self.ratios):.3g}" if self.ratios else ""
        if len(self.ratios) > 1:
            spread += f" ({min(self.ratios):.3g} to {max(self.ratios):.3g})"
        return f"| {self.what} | {self.ours} | {self.theirs} | {spread} | {self.bar} |"


def cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS = {"wall": time.perf_counter, "cpu": cpu_seconds}


@dataclass(frozen=True)
class Settings:
    """What a row is measured on, and how."""

    data: Path  # a folder with train.jsonl
    output: Path  # keeps the warm start of `iteration`
    repeats: int  # turns
    clock: Callable[[], float]
    peak_tflops: float | None = None  # of the accelerator, dense and in bf16, where its name does not tell

    def seconds(self, work: Callable[[], object]) -> float:
        """What one call takes."""
        began = self.clock()
        work()
        return self.clock() - began

    def alternate(self, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[list[float], list[float]]:
        """Both in turn, the first turn of each thrown away."""
        set_aside()
        turns = [(ours(), theirs()) for _ in range(self.repeats + 1)][1:]
        return [o for o, _ in turns], [t for _, t in turns]


def set_aside() -> None:
    """Have the garbage collector pass over what the process holds by now.

    It goes through everything now and then, 250 ms for a replay of 100,000 episodes and its examples, and all of that
    falls on the one side whose turn it happens to be.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def compare(what: str, ours: list[float], theirs: list[float], unit: str, bar: str) -> Line:
    """Rates of both, and their ratio turn by turn."""
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    return Line(what, f"{statistics.median(ours):,.0f} {unit}", f"{statistics.median(theirs):,.0f} {unit}", ratios, bar)
