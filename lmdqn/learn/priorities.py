"""Which group is drawn how often: masses by residual in a sum tree (prioritised replay, Schaul et al. 2016)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

SMALLEST_RESIDUAL = 1e-3  # so that a group that is learnt may still be drawn


class SumTree:
    """Masses of slots 0 .. capacity - 1, zero at the start; sets one and finds one in logarithmic time."""

    def __init__(self, capacity: int):
        self.capacity = 1
        while self.capacity < capacity:
            self.capacity *= 2
        self._sums = [0.0] * (2 * self.capacity)  # node i has the children 2i and 2i + 1; leaves stand at the end

    @property
    def total(self) -> float:
        return self._sums[1]

    def __getitem__(self, slot: int) -> float:
        return self._sums[self.capacity + slot]

    def __setitem__(self, slot: int, mass: float) -> None:
        node = self.capacity + slot
        self._sums[node] = mass
        while node > 1:
            node //= 2
            self._sums[node] = self._sums[2 * node] + self._sums[2 * node + 1]

    def find(self, point: float) -> int:
        """The slot whose mass covers `point`, 0 <= point < total; never one without mass."""
        node = 1
        while node < self.capacity:
            node *= 2
            if point >= self._sums[node] and self._sums[node + 1] > 0:
                point -= self._sums[node]
                node += 1
        return node - self.capacity


class Priorities:
    """Groups by number, each with the mass (mean |residual| + a little)^alpha; new ones with the greatest so far."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self._tree = SumTree(1)
        self._slot_of: dict[int, int] = {}
        self._number_in: list[int | None] = []  # by slot
        self._free: list[int] = []
        self._greatest = 1.0

    def __len__(self) -> int:
        return len(self._slot_of)

    def enter(self, numbers: Iterable[int]) -> None:
        """Take in groups that were not learnt from yet."""
        for number in numbers:
            if not self._free:
                self._free.append(len(self._number_in))
                self._number_in.append(None)
            self._place(number, self._free.pop(), self._greatest)

    def leave(self, number: int) -> None:
        slot = self._slot_of.pop(number)
        self._tree[slot] = 0.0
        self._number_in[slot] = None
        self._free.append(slot)

    def learnt_from(self, residuals: Mapping[int, float]) -> None:
        """Take the mean |residual| of groups by number; those that are not held are passed over."""
        for number in residuals.keys() & self._slot_of.keys():
            mass = (residuals[number] + SMALLEST_RESIDUAL) ** self.alpha
            self._tree[self._slot_of[number]] = mass
            self._greatest = max(self._greatest, mass)

    def draw(self, count: int, generator: torch.Generator, correction: float) -> list[tuple[int, float]]:
        """Numbers of groups, with replacement, a point in each of `count` equal parts of the total mass.

        Each with its weight, (N P)^-correction over the greatest that any group has (Schaul et al. 2016, section 3.4).
        """
        if count == 0:
            return []
        points = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        slots = [self._tree.find(point * self._tree.total) for point in points.tolist()]
        smallest = min(self._tree[slot] for slot in self._slot_of.values())
        weights = [(smallest / self._tree[slot]) ** correction for slot in slots]
        numbers = [self._number_in[slot] for slot in slots]
        return [(number, weight) for number, weight in zip(numbers, weights, strict=True) if number is not None]

    def state(self) -> dict[str, Any]:
        """Everything that draws depend on, for a checkpoint."""
        slots = list(self._slot_of.values())
        return {
            "numbers": torch.tensor(list(self._slot_of), dtype=torch.int64),
            "slots": torch.tensor(slots, dtype=torch.int64),
            "masses": torch.tensor([self._tree[slot] for slot in slots], dtype=torch.float64),
            "free": torch.tensor(self._free, dtype=torch.int64),
            "greatest": self._greatest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Draw what would have been drawn when `state()` was taken."""
        self.__init__(self.alpha)  # type: ignore[misc]
        self._number_in = [None] * (len(state["slots"]) + len(state["free"]))
        for number, slot, mass in zip(*(state[key].tolist() for key in ("numbers", "slots", "masses")), strict=True):
            self._place(number, slot, mass)
        self._free, self._greatest = state["free"].tolist(), state["greatest"]

    def _place(self, number: int, slot: int, mass: float) -> None:
        if slot >= self._tree.capacity:
            grown = SumTree(2 * slot)
            for known in self._slot_of.values():
                grown[known] = self._tree[known]
            self._tree = grown
        self._slot_of[number], self._number_in[slot] = slot, number
        self._tree[slot] = mass
