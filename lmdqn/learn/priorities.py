"""Which group is drawn how often: masses in a sum tree, by residual (Schaul et al. 2016) or by reward."""

import math
from collections.abc import Mapping
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
        self._least = [math.inf] * (2 * self.capacity)  # the smallest mass below a node; those of 0 left out

    @property
    def total(self) -> float:
        return self._sums[1]

    @property
    def least(self) -> float:
        """The smallest mass, those of 0 left out."""
        return self._least[1]

    def __getitem__(self, slot: int) -> float:
        return self._sums[self.capacity + slot]

    def __setitem__(self, slot: int, mass: float) -> None:
        node, sums, least = self.capacity + slot, self._sums, self._least
        sums[node], least[node] = mass, mass if mass > 0 else math.inf
        while node > 1:
            node //= 2
            left, right = 2 * node, 2 * node + 1
            sums[node] = sums[left] + sums[right]
            least[node] = least[left] if least[left] < least[right] else least[right]

    def find(self, point: float) -> int:
        """The slot whose mass covers `point`, 0 <= point < total; never one without mass."""
        node = 1
        while node < self.capacity:
            node *= 2
            if point >= self._sums[node] and self._sums[node + 1] > 0:
                point -= self._sums[node]
                node += 1
        return node - self.capacity


class Masses:
    """A mass for each of some groups, by number: set, dropped and found in logarithmic time."""

    def __init__(self) -> None:
        self._tree = SumTree(1)
        self._slot_of: dict[int, int] = {}
        self._number_in: list[int] = []  # by slot, -1 where it is free
        self._free: list[int] = []

    @property
    def total(self) -> float:
        return self._tree.total

    @property
    def least(self) -> float:
        """The smallest mass that any group has."""
        return self._tree.least

    def __contains__(self, number: int) -> bool:
        return number in self._slot_of

    def __getitem__(self, number: int) -> float:
        return self._tree[self._slot_of[number]]

    def __setitem__(self, number: int, mass: float) -> None:
        """Take in a group, or give it another mass."""
        slot = self._slot_of.get(number)
        if slot is None:
            if not self._free:
                self._free.append(len(self._number_in))
                self._number_in.append(-1)
            slot = self._free.pop()
        self._place(number, slot, mass)

    def __delitem__(self, number: int) -> None:
        slot = self._slot_of.pop(number)
        self._tree[slot] = 0.0
        self._number_in[slot] = -1
        self._free.append(slot)

    def find(self, point: float) -> int:
        """The group whose mass covers `point`, 0 <= point < total."""
        return self._number_in[self._tree.find(point)]

    def state(self) -> dict[str, Any]:
        """Everything that `find` depends on, for a checkpoint."""
        slots = list(self._slot_of.values())
        return {
            "numbers": torch.tensor(list(self._slot_of), dtype=torch.int64),
            "slots": torch.tensor(slots, dtype=torch.int64),
            "masses": torch.tensor([self._tree[slot] for slot in slots], dtype=torch.float64),
            "free": torch.tensor(self._free, dtype=torch.int64),
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Masses":
        """What gave `state()`."""
        masses = cls()
        masses._number_in = [-1] * (len(state["slots"]) + len(state["free"]))
        for number, slot, mass in zip(*(state[key].tolist() for key in ("numbers", "slots", "masses")), strict=True):
            masses._place(number, slot, mass)
        masses._free = state["free"].tolist()
        return masses

    def _place(self, number: int, slot: int, mass: float) -> None:
        if slot >= self._tree.capacity:
            grown = SumTree(2 * slot)
            for known in self._slot_of.values():
                grown[known] = self._tree[known]
            self._tree = grown
        self._slot_of[number], self._number_in[slot] = slot, number
        self._tree[slot] = mass


class Priorities:
    """Groups by number, each with the mass (mean |residual| + a little)^alpha; new ones with the greatest so far."""

    def __init__(self, alpha: float):
        self.alpha = alpha
        self._masses = Masses()
        self._greatest = 1.0

    def enter(self, number: int, reward: float) -> None:
        """Take in a group that was not learnt from yet."""
        self._masses[number] = self._greatest

    def leave(self, number: int) -> None:
        del self._masses[number]

    def learnt_from(self, residuals: Mapping[int, float]) -> None:
        """Take the mean |residual| of groups by number; those that are not held are passed over."""
        for number, residual in residuals.items():
            if number in self._masses:
                mass = (residual + SMALLEST_RESIDUAL) ** self.alpha
                self._masses[number] = mass
                self._greatest = max(self._greatest, mass)

    def draw(self, count: int, generator: torch.Generator, correction: float) -> list[tuple[int, float]]:
        """Numbers of groups, with replacement, a point in each of `count` equal parts of the total mass.

        Each with its weight, (N P)^-correction over the greatest that any group has (Schaul et al. 2016, section 3.4).
        """
        if count == 0:
            return []
        points = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        numbers = [self._masses.find(point * self._masses.total) for point in points.tolist()]
        return [(number, (self._masses.least / self._masses[number]) ** correction) for number in numbers]

    def state(self) -> dict[str, Any]:
        """Everything that draws depend on, for a checkpoint."""
        return {**self._masses.state(), "greatest": self._greatest}

    def restore(self, state: dict[str, Any]) -> None:
        """Draw what would have been drawn when `state()` was taken."""
        self._masses, self._greatest = Masses.of_state(state), state["greatest"]


class RewardMasses:
    """Groups by number, drawn by the softmax of their mean rewards over a temperature."""

    def __init__(self, temperature: float):
        self.temperature = temperature
        self._masses = Masses()
        self._origin: float | None = None  # the first reward: only differences count

    def enter(self, number: int, reward: float) -> None:
        """Take in a group. Beyond 600 temperatures from the first reward all are as good, or as bad."""
        self._origin = reward if self._origin is None else self._origin
        self._masses[number] = math.exp(min(600.0, max(-600.0, (reward - self._origin) / self.temperature)))

    def leave(self, number: int) -> None:
        del self._masses[number]

    def learnt_from(self, residuals: Mapping[int, float]) -> None:
        """Rewards stay what they are."""

    def draw(self, count: int, generator: torch.Generator, correction: float) -> list[tuple[int, float]]:
        """Numbers of different groups, one after the other by their masses, each with the weight 1."""
        drawn: dict[int, float] = {}
        for share in torch.rand(count, generator=generator, dtype=torch.float64).tolist():
            number = self._masses.find(share * self._masses.total)
            drawn[number] = self._masses[number]
            self._masses[number] = 0.0
        for number, mass in drawn.items():
            self._masses[number] = mass
        return [(number, 1.0) for number in drawn]

    def state(self) -> dict[str, Any]:
        """Everything that draws depend on, for a checkpoint."""
        return {**self._masses.state(), "origin": self._origin}

    def restore(self, state: dict[str, Any]) -> None:
        """Draw what would have been drawn when `state()` was taken."""
        self._masses, self._origin = Masses.of_state(state), state["origin"]
