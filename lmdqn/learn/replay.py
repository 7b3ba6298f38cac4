"""The replay: prompt groups of episodes, kept whole, the oldest leaving first; and how a batch is drawn from it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lmdqn.episodes import Episode
from lmdqn.learn.packing import PackedEpisodes
from lmdqn.learn.priorities import Priorities, RewardMasses
from lmdqn.recipe import ReplaySection

Group = list[Episode]
BLOCK_GROUPS = 64  # are packed together, and their memory is given back together


class Draw(NamedTuple):
    """A group that was drawn for a batch."""

    number: int
    weight: float  # of its residuals
    group: Group | None  # None where another process holds it


@dataclass(slots=True)
class _Held:
    """A group in the ring: what draws depend on, and its episodes, packed or not, unless another process holds them."""

    number: int
    episodes: int
    tokens: int
    reward: float  # mean
    group: Group | None
    packed: PackedEpisodes | None = None
    first: int = 0  # of the packed episodes

    def open(self) -> Group | None:
        return self.group if self.packed is None else self.packed.episodes(self.first, self.episodes)


class Replay:
    """A ring of prompt groups within the recipe's capacity (but always the newest rollout), and a log that stays.

    What is older than the newest rollout is packed: draws give copies, and `keep_measured` takes what they lacked.

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
        self.tokens = 0  # of responses, held by all processes, the log left out
        self._episodes = 0
        self._older: list[_Held] = []
        self._older_by_number: dict[int, _Held] = {}
        self._fresh: list[_Held] = []
        self._priorities: Priorities | RewardMasses | None = None
        if recipe.sampling == "prioritised":
            self._priorities = Priorities(recipe.priority_exponent)
            for number in range(len(log)):
                self._priorities.enter(number, 0.0)
        elif recipe.sampling == "reward":
            self._priorities = RewardMasses(recipe.reward_temperature)
            for number, group in enumerate(log):
                self._priorities.enter(number, _mean_reward(group))

    def __len__(self) -> int:
        """Episodes held by all processes, the log left out."""
        return self._episodes

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another group as large as the largest of the newest."""
        episodes = max((held.episodes for held in self._fresh), default=0)
        tokens = max((held.tokens for held in self._fresh), default=0)
        return self._is_over_capacity(episodes, tokens)

    def add(self, groups: Sequence[Group]) -> None:
        """Take in a rollout; it is the fresh one until the next."""
        self._age(self._fresh)
        if self._priorities is not None:
            for held in self._fresh:
                self._priorities.enter(held.number, held.reward)
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
        newest = torch.randperm(len(self._fresh), generator=generator)[:fresh].tolist()  # a rollout stays small
        chosen = [Draw(held.number, 1.0, held.group) for held in (self._fresh[place] for place in newest)]
        if self._priorities is not None:
            drawn = self._priorities.draw(older, generator, correction)
        else:
            places = _different(others, older, generator)
            drawn = [(p if p < len(self.log) else self._older[p - len(self.log)].number, 1.0) for p in places]
        for number, weight in drawn:
            group = self.log[number] if number < len(self.log) else self._older_by_number[number].open()
            chosen.append(Draw(number, weight, group))
        return chosen

    def keep_measured(self, groups: Iterable[Group]) -> None:
        """Take the log-probabilities of groups that were drawn and then measured."""
        for group in groups:
            held = self._older_by_number.get(group[0].group)
            if held is not None and held.packed is not None:
                held.packed.measured(held.first, group)

    def learnt_from(self, residuals: Mapping[int, float]) -> None:
        """Take the mean |residual| of groups, by their numbers: what prioritised sampling goes by."""
        if self._priorities is not None:
            self._priorities.learnt_from(residuals)

    def forget_reference(self) -> None:
        """Drop what the reference network said of every episode: it is measured again when one is drawn."""
        held_log = self.log if isinstance(self.log, list) else ()
        for group in (*held_log, *(held.group or () for held in self._fresh)):
            for episode in group:
                episode.reference_log_probs = None
        for held in self._older:
            if held.packed is not None:
                held.packed.forget("reference_log_probs")

    def episodes(self) -> Iterator[Episode]:
        """All that this process holds, oldest first, the log left out."""
        for held in (*self._older, *self._fresh):
            yield from held.open() or ()

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
        self._forget_all()
        episodes = iter(state["episodes"])
        groups = [self._kept([next(episodes) for _ in range(size)]) for size in state["sizes"]]
        older = len(groups) - state["fresh"]
        self._age(groups[:older])
        self._fresh = groups[older:]
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
        self._forget_all()
        self._age([self._kept(group) for group in (*groups, *more)])
        if self._priorities is not None:
            for held in self._older:
                self._priorities.enter(held.number, held.reward)
        self._drop_the_oldest()

    def _drop_the_oldest(self) -> None:
        gone = 0
        while gone < len(self._older) and self._is_over_capacity():
            held = self._older[gone]
            gone += 1
            self._episodes -= held.episodes
            self.tokens -= held.tokens
            del self._older_by_number[held.number]
            if self._priorities is not None:
                self._priorities.leave(held.number)
        del self._older[:gone]

    def _is_over_capacity(self, more_episodes: int = 0, more_tokens: int = 0) -> bool:
        most_episodes, most_tokens = self.recipe.capacity_episodes, self.recipe.capacity_tokens
        return len(self) + more_episodes > most_episodes or (
            most_tokens is not None and self.tokens + more_tokens > most_tokens
        )

    def _kept(self, group: Group) -> _Held:
        """Count a new group in."""
        number, tokens = group[0].group, sum(len(episode.response_ids) for episode in group)
        self._episodes += len(group)
        self.tokens += tokens
        return _Held(number, len(group), tokens, _mean_reward(group), group if self._holds(number) else None)

    def _age(self, groups: Sequence[_Held]) -> None:
        """Pack groups, and hold them behind those that are older."""
        self._older += groups
        self._older_by_number |= {held.number: held for held in groups}
        here = [(held, held.group) for held in groups if held.group is not None]
        for begin in range(0, len(here), BLOCK_GROUPS):
            block = here[begin : begin + BLOCK_GROUPS]
            packed = PackedEpisodes.of([e for _, group in block for e in group], match_features=False)
            first = 0
            for held, group in block:
                held.packed, held.first, held.group = packed, first, None
                first += len(group)

    def _forget_all(self) -> None:
        self._older, self._older_by_number, self._fresh = [], {}, []
        self._episodes = self.tokens = 0


def most_telling(group: Group, share: float) -> Group:
    """The group with that share of its samples, no fewer than two: those whose rewards are furthest from their mean.

    They have the largest advantages, so that an update, whose cost is by the token, learns most from them (Xu et al.
    2025 do so in GRPO). At the optimum of a soft or hard backup the residual of every response is zero, so the choice
    moves no optimum; whole returns of the policy itself are a mean over samples, which it biases. Demonstrations stay.
    """
    sampled = [episode for episode in group if not episode.demonstration]
    mean = _mean_reward(sampled)
    nearest_last = sorted(sampled, key=lambda episode: -abs(episode.reward - mean))
    left = {id(episode) for episode in nearest_last[max(2, math.ceil(share * len(sampled))) :]}
    return [episode for episode in group if id(episode) not in left]


def _mean_reward(group: Group) -> float:
    return sum(episode.reward for episode in group) / len(group)


def _different(held: int, count: int, generator: torch.Generator) -> list[int]:
    """`count` different places, uniformly, in time that does not grow with `held` (Floyd; Bentley 1987)."""
    chosen: dict[int, None] = {}
    for last in range(held - count, held):
        place = int(torch.randint(last + 1, (), generator=generator))
        chosen[last if place in chosen else place] = None
    return list(chosen)
