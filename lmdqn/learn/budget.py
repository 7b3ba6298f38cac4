"""How much of a phase may be spent: steps, and seconds of work with pauses for evaluation."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Budget:
    """Spent at `max_steps`, or when `max_seconds` of wall-clock time have passed outside `paused()`."""

    def __init__(self, max_steps: int, max_seconds: float | None):
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self._started_s = time.perf_counter()
        self._paused_s = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of work so far."""
        return time.perf_counter() - self._started_s - self._paused_s

    def progress(self, step: int) -> float:
        """Share of the budget that is spent after `step` steps, 0 to 1, by whichever limit is nearer."""
        by_steps = step / self.max_steps if self.max_steps else 1.0
        by_seconds = self.seconds / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_steps, by_seconds))

    def spent(self, step: int) -> bool:
        return self.progress(step) >= 1.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not counted."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began
