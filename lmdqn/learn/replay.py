"""The replay: prompt groups of episodes, kept whole, the oldest leaving first."""

from collections import deque
from collections.abc import Sequence

import torch

from lmdqn.episodes import Episode

Group = list[Episode]


class Replay:
    """A ring of prompt groups that holds at most `capacity_episodes` episodes (but always the newest rollout)."""

    def __init__(self, capacity_episodes: int):
        self.capacity_episodes = capacity_episodes
        self._older: deque[Group] = deque()
        self._fresh: list[Group] = []

    def __len__(self) -> int:
        """Episodes held."""
        return sum(len(group) for group in (*self._older, *self._fresh))

    def add(self, groups: Sequence[Group]) -> None:
        """Take in a rollout; it is the fresh one until the next."""
        self._older.extend(self._fresh)
        self._fresh = list(groups)
        while self._older and len(self) > self.capacity_episodes:
            self._older.popleft()

    def sample(self, groups: int, fresh_share: float, generator: torch.Generator) -> list[Episode]:
        """Episodes of `groups` different groups, in no particular order.

        `fresh_share` of them come from the newest rollout and the rest, uniformly, from all older groups; where one
        side has too few, the other fills in.
        """
        fresh = min(round(groups * fresh_share), len(self._fresh))
        older = min(groups - fresh, len(self._older))
        fresh = min(groups - older, len(self._fresh))
        chosen = _draw(self._fresh, fresh, generator) + _draw(self._older, older, generator)
        return [episode for group in chosen for episode in group]


def _draw(groups: Sequence[Group], count: int, generator: torch.Generator) -> list[Group]:
    """`count` different groups, uniformly."""
    return [groups[i] for i in torch.randperm(len(groups), generator=generator)[:count].tolist()]
