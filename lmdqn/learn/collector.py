"""New experience: draw prompts, roll out, add demonstrations, score and centre. What comes out goes into the replay."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from lmdqn.background import in_background
from lmdqn.episodes import Episode, Example, by_group, demonstration
from lmdqn.errors import NotFinite
from lmdqn.learn.match_features import measure_matches
from lmdqn.learn.packing import PackedEpisodes
from lmdqn.learn.processes import Processes
from lmdqn.learn.prompt_draw import ExampleWalk
from lmdqn.learn.replay import Group
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import QNetwork
from lmdqn.model.rollout import LogProbs, Rollout, measure_log_probs
from lmdqn.recipe import Recipe
from lmdqn.text.rewards import TaskRewards, centre


class Prompt(NamedTuple):
    """A prompt of a rollout."""

    example: Example
    group: int
    references: list[int]  # the numbers of those that join its group as demonstrations


class Waiting(NamedTuple):
    """This process's share of a rollout that is written, and scored in a thread until the next step asks for it."""

    episodes: list[Episode]
    scored: Future[None]


@dataclass
class Collector:
    """Gives groups of scored episodes, each group one prompt's samples and demonstrations."""

    recipe: Recipe
    networks: Networks
    rollout: Rollout
    examples: Sequence[Example]
    reward: TaskRewards
    accelerator: Accelerator
    processes: Processes
    prompt_generator: torch.Generator
    groups_made: int = field(init=False, default=0)
    _walk: ExampleWalk = field(init=False)
    _running_rewards: dict[str, float] = field(init=False, default_factory=dict)  # by task
    _waiting: Waiting | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._walk = ExampleWalk(
            self.examples,
            self.recipe.task_weights,
            self.recipe.rollout.prompt_draw,
            self.prompt_generator,
        )

    def new_groups(self, exploration: Exploration) -> list[Group]:
        """Roll out the next prompts, add demonstrations, score and centre: whole groups, ready for the replay.

        Each process does so for its share of the prompts, and all of them get all groups. With overlap_scoring these
        were written by the call before, and what this one writes is scored while it is learnt from them.

        Raises:
            NotFinite: logits or rewards are not finite.
        """
        if self.recipe.rollout.overlap_scoring:
            written = self._scored_meanwhile(exploration)
        else:
            written = self._write(exploration)
            self.processes.together(lambda: self.reward.score(written))
        groups = list(self.exchange(written).values())
        self._centre(groups)
        return groups

    def _scored_meanwhile(self, exploration: Exploration) -> list[Episode]:
        """The rollout that waited, scored by now; another one is written and waits. The first call writes both."""
        if self._waiting is None:
            self._waiting = self._being_scored(self._write(exploration))
        ready, following = self._waiting, self._write(exploration)
        try:
            self.processes.together(ready.scored.result)
        except NotFinite:  # the run goes on without it; any other error ends the run, and nothing more is scored
            self._waiting = self._being_scored(following)
            raise
        self._waiting = self._being_scored(following)
        return ready.episodes

    def _being_scored(self, episodes: list[Episode]) -> Waiting:
        """Those of a checkpoint have their scores, unless scoring failed."""
        unscored = [episode for episode in episodes if not episode.terms]
        return Waiting(episodes, in_background(lambda: self.reward.score(unscored)))

    def settle(self) -> None:
        """Wait until nothing is being scored: a function that a user brings need not bear two calls at once."""
        if self._waiting is not None:
            wait([self._waiting.scored])

    def forget_waiting(self) -> None:
        """Drop the rollout that waits; the next call writes two again."""
        self.settle()
        self._waiting = None

    def exchange(self, episodes: Sequence[Episode]) -> dict[int, Group]:
        """Every process gives some whole groups, no two the same one: those of all, in order of their numbers."""
        if self.processes.count > 1:
            shares = self.processes.together(lambda: PackedEpisodes.of(episodes))
            episodes = [episode for share in shares for episode in share.episodes()]
        groups = sorted(by_group(episodes), key=lambda group: group[0].group)
        return {group[0].group: group for group in groups}

    def _write(self, exploration: Exploration) -> list[Episode]:
        """Samples and demonstrations of the next prompts; each process writes those of its share."""
        drawn = [self.examples[number] for number in self._walk.next(self.recipe.rollout.prompts)]
        prompts = [
            Prompt(example, group, self._reference_numbers(example))
            for group, example in enumerate(drawn, start=self.groups_made)
        ]
        self.groups_made += len(prompts)
        mine = self.processes.share(prompts)
        networks = self.networks
        written: list[Episode] = []
        known = networks.reference.whole() if exploration.needs_reference else nullcontext(networks.reference)
        with networks.online.whole() as online, known as reference:
            self.processes.together(lambda: written.extend(self._sample(mine, exploration, online, reference)))
        return written

    def _sample(
        self, prompts: Sequence["Prompt"], exploration: Exploration, online: QNetwork, reference: QNetwork
    ) -> list[Episode]:
        """Samples and demonstrations of some prompts."""
        recipe = self.recipe
        with self.accelerator.autocast():
            episodes = self.rollout.sample(
                online,
                [prompt.example for prompt in prompts],
                recipe.rollout.samples,
                exploration,
                recipe.seed,
                [prompt.group for prompt in prompts],
                reference,
            )
        for prompt in prompts:
            for k in prompt.references:
                episodes.append(demonstration(prompt.example, k, prompt.group, self.rollout.layout.eos_ids))
        return episodes

    def measure(self, episodes: Sequence[Episode]) -> None:
        """Write what the frozen networks and the references say of episodes, where that is not known yet.

        Each process may bring episodes of its own, and all must call it.
        """
        self._read_by(self.networks.reference, [e for e in episodes if e.reference_log_probs is None])
        if self.networks.first is not None:
            unread = [e for e in episodes if e.first_log_probs is None]
            self._read_by(self.networks.first, unread, "first_log_probs")
        if self.recipe.offline is not None and self.recipe.offline.behaviour == "reference":
            beside_the_log = "reference_log_probs" if self.networks.first is None else "first_log_probs"
            for episode in episodes:
                if episode.behaviour_log_probs is None:
                    episode.behaviour_log_probs = getattr(episode, beside_the_log)
        if self.recipe.qlearning.value_sees_references:
            measure_matches([e for e in episodes if e.match_features is None])

    def _read_by(self, frozen: QNetwork, unread: Sequence[Episode], name: LogProbs = "reference_log_probs") -> None:
        """A frozen network's log-probabilities; its weights are gathered only if a process has something to read."""
        if frozen.shards is not None and not any(self.processes.together(lambda: len(unread))):
            return
        with frozen.whole() as whole, self.accelerator.autocast():
            measure_log_probs(whole, unread, self.rollout.layout, self.recipe.optimisation.micro_batch_tokens, name)

    def state(self) -> dict[str, Any]:
        """Where in the walk over the prompts it stands, and the rollout that waits, for a checkpoint."""
        state: dict[str, Any] = {
            "groups_made": self.groups_made,
            "walk": self._walk.state(),
            "running_rewards": dict(self._running_rewards),
        }
        if self._waiting is not None:
            self.settle()
            groups = self.exchange(self._waiting.episodes)
            state["waiting"] = [episode for group in groups.values() for episode in group]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave."""
        self.groups_made = state["groups_made"]
        self._walk.restore(state["walk"])
        self._running_rewards = dict(state["running_rewards"])
        self._waiting = None
        if "waiting" in state:
            mine = self.processes.share(by_group(state["waiting"]))
            self._waiting = self._being_scored([episode for group in mine for episode in group])

    def go_on_from(self, state: Mapping[str, Any], more: int) -> None:
        """Number groups after those of a finished run and `more` that joined them, and keep its running rewards."""
        self.groups_made += state["groups_made"] + more
        self._running_rewards = dict(state["running_rewards"])

    def _reference_numbers(self, example: Example) -> list[int]:
        wanted = self.recipe.replay.demonstrations
        order = torch.randperm(len(example.references), generator=self.prompt_generator)
        return order[:wanted].tolist() if wanted else []

    def _centre(self, groups: Sequence[Group]) -> None:
        rewards: dict[str, list[float]] = {}
        for episode in (e for group in groups for e in group if not e.demonstration):
            rewards.setdefault(episode.example.task, []).append(episode.reward)
        for task, of_task in rewards.items():
            mean = fmean(of_task)
            self._running_rewards[task] = 0.9 * self._running_rewards.get(task, mean) + 0.1 * mean
        for group in groups:
            centre(group, self._running_rewards[group[0].example.task], self.recipe.qlearning)
