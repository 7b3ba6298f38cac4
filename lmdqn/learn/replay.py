"""The replay: prompt groups of episodes, kept whole, the oldest leaving first; and how a batch is drawn from it."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmdqn.episodes import Episode
from lmdqn.learn.priorities import Priorities
from lmdqn.recipe import ReplaySection

Group = list[Episode]


class Replay:
    """A ring of prompt groups within the recipe's capacity (but always the newest rollout), and a log that stays.

    The log's groups are numbered by their place in it, and others from its length on.

    A checkpoint keeps what `state()` gives, and a resumed run gets it back by `restore`. A state is a tree of dicts
    with text keys, lists, text, numbers, booleans, None, tensors and lists of episodes (each field of an episode is
    kept: tensors whose first axis is time, or plain values); the log is not in it, for it is read again. After
    `restore`, `sample` draws what it would have drawn: all that it depends on is kept, order included.
    """

    def __init__(self, recipe: ReplaySection, log: Sequence[Group] = ()):
        self.recipe = recipe
        self.log = log
        self._older: deque[Group] = deque()
        self._fresh: list[Group] = []
        self._priorities = Priorities(recipe.priority_exponent) if recipe.sampling == "prioritised" else None
        if self._priorities is not None:
            self._priorities.enter(range(len(log)))

    def __len__(self) -> int:
        """Episodes held, the log left out."""
        return sum(len(group) for group in (*self._older, *self._fresh))

    @property
    def tokens(self) -> int:
        """Response tokens held, the log left out."""
        return sum(len(episode.response_ids) for episode in self.episodes())

    def add(self, groups: Sequence[Group]) -> None:
        """Take in a rollout; it is the fresh one until the next."""
        if self._priorities is not None:
            self._priorities.enter(group[0].group for group in self._fresh)
        self._older.extend(self._fresh)
        self._fresh = list(groups)
        self._drop_the_oldest()

    def sample(self, groups: int, generator: torch.Generator, correction: float = 0.0) -> list[Episode]:
        """Episodes of `groups` groups, in no particular order, each with the weight of its residuals written into it.

        The recipe's `fresh_share` of them come from the newest rollout and the rest, by its `sampling`, from all that
        is older and the log; where one side has too few, the other fills in. Groups differ, but prioritised ones are
        drawn with replacement; `correction` is the exponent of their importance weights.
        """
        held = len(self.log) + len(self._older)
        fresh = min(round(groups * self.recipe.fresh_share), len(self._fresh))
        older = min(groups - fresh, held)
        fresh = min(groups - older, len(self._fresh))
        chosen = [(self._fresh[i], 1.0) for i in _uniform(len(self._fresh), fresh, generator)]
        if self._priorities is not None:
            numbered = {group[0].group: group for group in self._older}
            for number, weight in self._priorities.draw(older, generator, correction):
                chosen.append((self.log[number] if number < len(self.log) else numbered[number], weight))
        else:
            by_reward = self.recipe.sampling == "reward"
            places = (
                _by_mass(self._reward_masses(), older, generator) if by_reward else _uniform(held, older, generator)
            )
            chosen += [(self._older_group(place), 1.0) for place in places]
        return _weighed(chosen)

    def learnt_from(self, residuals: Mapping[int, float]) -> None:
        """Take the mean |residual| of groups, by their numbers: what prioritised sampling goes by."""
        if self._priorities is not None:
            self._priorities.learnt_from(residuals)

    def forget_reference(self) -> None:
        """Drop what the reference network said of every episode: it is measured again when one is drawn."""
        held_log = self.log if isinstance(self.log, list) else ()
        for group in (*held_log, *self._older, *self._fresh):
            for episode in group:
                episode.reference_log_probs = None

    def episodes(self) -> Iterator[Episode]:
        """All that is held, oldest first, the log left out."""
        for group in (*self._older, *self._fresh):
            yield from group

    def state(self) -> dict[str, Any]:
        """What is held, for a checkpoint."""
        groups = [*self._older, *self._fresh]
        return {
            "episodes": [episode for group in groups for episode in group],
            "sizes": [len(group) for group in groups],
            "fresh": len(self._fresh),
            "priorities": None if self._priorities is None else self._priorities.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Hold what `state()` gave, and nothing else."""
        episodes = iter(state["episodes"])
        groups = [[next(episodes) for _ in range(size)] for size in state["sizes"]]
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
        self._older, self._fresh = deque([*groups, *more]), []
        if self._priorities is not None:
            self._priorities.enter(group[0].group for group in self._older)
        self._drop_the_oldest()

    def _drop_the_oldest(self) -> None:
        while self._older and self._is_over_capacity():
            gone = self._older.popleft()
            if self._priorities is not None:
                self._priorities.leave(gone[0].group)

    def _is_over_capacity(self) -> bool:
        most_tokens = self.recipe.capacity_tokens
        return len(self) > self.recipe.capacity_episodes or (most_tokens is not None and self.tokens > most_tokens)

    def _older_group(self, place: int) -> Group:
        return self.log[place] if place < len(self.log) else self._older[place - len(self.log)]

    def _reward_masses(self) -> Tensor:
        """Softmax of the groups' mean rewards over the recipe's temperature."""
        groups = (self._older_group(place) for place in range(len(self.log) + len(self._older)))
        means = torch.tensor([sum(e.reward for e in group) / len(group) for group in groups], dtype=torch.float64)
        return (means / self.recipe.reward_temperature).softmax(0)


def _uniform(held: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` different places, uniformly."""
    return torch.randperm(held, generator=generator)[:count].tolist()


def _by_mass(masses: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """`count` different places, drawn by their masses one after the other (by Gumbel noise on the log-masses)."""
    noise = -torch.rand(len(masses), generator=generator, dtype=torch.float64).log()  # exponential
    return (masses.log() - noise.log()).topk(count).indices.tolist()


def _weighed(chosen: Sequence[tuple[Group, float]]) -> list[Episode]:
    for group, weight in chosen:
        for episode in group:
            episode.weight = weight
    return [episode for group, _ in chosen for episode in group]
