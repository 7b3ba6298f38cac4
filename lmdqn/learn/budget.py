"""How much of a phase may be spent: steps, and seconds of work with pauses for evaluation."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Budget:
    """Spent at `max_steps`, or when `max_seconds` by the clock have passed outside `paused()`.

    `already_s` are the seconds that a run had worked before it was stopped; `agreed` makes one number of the seconds
    of several processes.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)  # the wall's; a benchmark may count CPU time

    def __init__(
        self,
        max_steps: int,
        max_seconds: float | None,
        already_s: float = 0.0,
        agreed: Callable[[float], float] = lambda seconds: seconds,
    ):
        self._agreed = agreed
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self._started_s = self.clock() - already_s
        self._paused_s = 0.0
        self._pause_began_s: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds of work so far."""
        now_s = self.clock() if self._pause_began_s is None else self._pause_began_s
        return now_s - self._started_s - self._paused_s

    def progress(self, step: float) -> float:
        """Share of the budget that is spent after `step` steps, 0 to 1, by whichever limit is nearer."""
        by_steps = step / self.max_steps if self.max_steps else 1.0
        by_seconds = self._agreed(self.seconds) / self.max_seconds if self.max_seconds else 0.0
        return min(1.0, max(by_steps, by_seconds))

    def spent(self, step: int) -> bool:
        return self.progress(step) >= 1.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not counted."""
        self._pause_began_s = self.clock()
        yield
        self._paused_s += self.clock() - self._pause_began_s
        self._pause_began_s = None
