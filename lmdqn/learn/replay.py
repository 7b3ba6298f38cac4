"""The replay: prompt groups of episodes, kept whole, the oldest leaving first; and how a batch is drawn from it."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmdqn.episodes import Episode
from lmdqn.learn.priorities import Priorities
from lmdqn.recipe import ReplaySection

Group = list[Episode]


class Draw(NamedTuple):
    """A group that was drawn for a batch."""

    number: int
    weight: float  # of its residuals
    group: Group | None  # None where another process holds it


@dataclass
class _Held:
    """A group in the ring: what draws depend on, and its episodes unless another process holds them."""

    number: int
    episodes: int
    tokens: int
    reward: float  # mean
    group: Group | None


class Replay:
    """A ring of prompt groups within the recipe's capacity (but always the newest rollout), and a log that stays.

    The log's groups are numbered by their place in it, and others from its length on. Of several processes each keeps
    the episodes of the groups that `holds` tells it by their number, and of all groups what draws depend on: all of
    them draw the same.

    A checkpoint keeps what `state()` gives, and a resumed run gets it back by `restore`. A state is a tree of dicts
    with text keys, lists, text, numbers, booleans, None, tensors and lists of episodes (each field of an episode is
    kept: tensors whose first axis is time, or plain values); the log is not in it, for it is read again. After
    `restore`, `sample` draws what it would have drawn: all that it depends on is kept, order included.
    """

    def __init__(
        self, recipe: ReplaySection, log: Sequence[Group] = (), holds: Callable[[int], bool] = lambda number: True
    ):
        self.recipe = recipe
        self.log = log
        self._holds = holds
        self._older: deque[_Held] = deque()
        self._fresh: list[_Held] = []
        self._priorities = Priorities(recipe.priority_exponent) if recipe.sampling == "prioritised" else None
        if self._priorities is not None:
            self._priorities.enter(range(len(log)))

    def __len__(self) -> int:
        """Episodes held by all processes, the log left out."""
        return sum(held.episodes for held in (*self._older, *self._fresh))

    @property
    def tokens(self) -> int:
        """Response tokens held by all processes, the log left out."""
        return sum(held.tokens for held in (*self._older, *self._fresh))

    def add(self, groups: Sequence[Group]) -> None:
        """Take in a rollout; it is the fresh one until the next."""
        if self._priorities is not None:
            self._priorities.enter(held.number for held in self._fresh)
        self._older.extend(self._fresh)
        self._fresh = [self._kept(group) for group in groups]
        self._drop_the_oldest()

    def draw(self, groups: int, generator: torch.Generator, correction: float = 0.0) -> list[Draw]:
        """A batch of `groups` groups, in no particular order.

        The recipe's `fresh_share` of them come from the newest rollout and the rest, by its `sampling`, from all that
        is older and the log; where one side has too few, the other fills in. Groups differ, but prioritised ones are
        drawn with replacement; `correction` is the exponent of their importance weights.
        """
        others = len(self.log) + len(self._older)
        fresh = min(round(groups * self.recipe.fresh_share), len(self._fresh))
        older = min(groups - fresh, others)
        fresh = min(groups - older, len(self._fresh))
        chosen = [
            Draw(f.number, 1.0, f.group) for f in (self._fresh[i] for i in _uniform(len(self._fresh), fresh, generator))
        ]
        if self._priorities is not None:
            numbered = {old.number: old.group for old in self._older}
            for number, weight in self._priorities.draw(older, generator, correction):
                chosen.append(Draw(number, weight, self.log[number] if number < len(self.log) else numbered[number]))
        else:
            by_reward = self.recipe.sampling == "reward"
            places = (
                _by_mass(self._reward_masses(), older, generator) if by_reward else _uniform(others, older, generator)
            )
            chosen += [self._older_draw(place) for place in places]
        return chosen

    def learnt_from(self, residuals: Mapping[int, float]) -> None:
        """Take the mean |residual| of groups, by their numbers: what prioritised sampling goes by."""
        if self._priorities is not None:
            self._priorities.learnt_from(residuals)

    def forget_reference(self) -> None:
        """Drop what the reference network said of every episode: it is measured again when one is drawn."""
        held_log = self.log if isinstance(self.log, list) else ()
        for group in (*held_log, *(held.group or () for held in (*self._older, *self._fresh))):
            for episode in group:
                episode.reference_log_probs = None

    def episodes(self) -> Iterator[Episode]:
        """All that this process holds, oldest first, the log left out."""
        for held in (*self._older, *self._fresh):
            yield from held.group or ()

    def state(self, everywhere: Mapping[int, Group]) -> dict[str, Any]:
        """What is held, for a checkpoint; `everywhere` are the groups of all processes, by number."""
        held = [*self._older, *self._fresh]
        return {
            "episodes": [episode for each in held for episode in everywhere[each.number]],
            "sizes": [each.episodes for each in held],
            "fresh": len(self._fresh),
            "priorities": None if self._priorities is None else self._priorities.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Hold what `state()` gave, and nothing else."""
        episodes = iter(state["episodes"])
        groups = [self._kept([next(episodes) for _ in range(size)]) for size in state["sizes"]]
        older = len(groups) - state["fresh"]
        self._older, self._fresh = deque(groups[:older]), groups[older:]
        if self._priorities is not None:
            self._priorities.restore(state["priorities"])

    def take_over(self, state: Mapping[str, Any], first: int, more: Sequence[Group] = ()) -> None:
        """Hold what a finished run's replay held by its `state()`, and `more` groups; to a new run all of it is old.

        Their numbers, which are all moved by `first`, must be those of no group of the log. Priorities begin anew: what
        was learnt of a group by the finished run says little of what is left to learn.
        """
        episodes = iter(state["episodes"])
        groups = [[next(episodes) for _ in range(size)] for size in state["sizes"]]
        for episode in (e for group in (*groups, *more) for e in group):
            episode.group += first
        self._older, self._fresh = deque(self._kept(group) for group in (*groups, *more)), []
        if self._priorities is not None:
            self._priorities.enter(held.number for held in self._older)
        self._drop_the_oldest()

    def _drop_the_oldest(self) -> None:
        while self._older and self._is_over_capacity():
            gone = self._older.popleft()
            if self._priorities is not None:
                self._priorities.leave(gone.number)

    def _is_over_capacity(self) -> bool:
        most_tokens = self.recipe.capacity_tokens
        return len(self) > self.recipe.capacity_episodes or (most_tokens is not None and self.tokens > most_tokens)

    def _kept(self, group: Group) -> _Held:
        number, tokens = group[0].group, sum(len(episode.response_ids) for episode in group)
        reward = sum(e.reward for e in group) / len(group)
        return _Held(number, len(group), tokens, reward, group if self._holds(number) else None)

    def _older_draw(self, place: int) -> Draw:
        if place < len(self.log):
            return Draw(place, 1.0, self.log[place])
        held = self._older[place - len(self.log)]
        return Draw(held.number, 1.0, held.group)

    def _reward_masses(self) -> Tensor:
        """Softmax of the groups' mean rewards over the recipe's temperature."""
        logged = [sum(e.reward for e in group) / len(group) for group in self.log]
        means = torch.tensor([*logged, *(held.reward for held in self._older)], dtype=torch.float64)
        return (means / self.recipe.reward_temperature).softmax(0)


def _uniform(held: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` different places, uniformly."""
    return torch.randperm(held, generator=generator)[:count].tolist()


def _by_mass(masses: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """`count` different places, drawn by their masses one after the other (by Gumbel noise on the log-masses)."""
    noise = -torch.rand(len(masses), generator=generator, dtype=torch.float64).log()  # exponential
    return (masses.log() - noise.log()).topk(count).indices.tolist()
