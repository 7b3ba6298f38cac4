"""One update at a time: episodes from the replay, their loss, a step of the online network, then the target's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from lmdqn.episodes import Batch, Episode, Example, SequenceFormat, make_batch, micro_batches, shortest_episode
from lmdqn.errors import NotFinite
from lmdqn.learn.collector import Collector
from lmdqn.learn.learning_rates import rate_factor
from lmdqn.learn.match_features import mean_and_deviation, value_moments
from lmdqn.learn.objective import Learnt, loss_terms, q_loss
from lmdqn.learn.optimisation import Optimiser
from lmdqn.learn.processes import Processes, deal
from lmdqn.learn.replay import Draw, Replay
from lmdqn.learn.step_record import Update, for_the_record, residuals_of_groups, whole_update
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.recipe import Recipe

ROUNDING = 1e-6  # a deviation of returns, in reward units, that equal ones may show


@dataclass
class Updater:
    """Learns from what is in the replay; each process from its share of a batch."""

    recipe: Recipe
    networks: Networks
    replay: Replay
    collector: Collector
    optimiser: Optimiser
    processes: Processes
    generator: torch.Generator  # of the draws from the replay
    layout: SequenceFormat
    examples: Sequence[Example]
    updates: int = field(init=False, default=0)

    @cached_property
    def _idle(self) -> Batch:
        episode = shortest_episode(self.examples, self.layout)
        return make_batch([episode], self.layout).to(self.networks.online.device)

    def update(self, progress: float, step: int, exploration: Exploration) -> Update:
        """One update of the online network on a batch from the replay, then of the target network.

        `progress` is the share of the phase's budget, 0 to 1, that is spent half-way through this step, the `step`th
        from 0; `exploration` is the behaviour policy of the moment.

        Raises:
            NotFinite: the loss or its gradient is not; it holds the batch's episodes.
        """
        recipe = self.recipe
        first = recipe.replay.priority_correction
        correction = first + progress * (1 - first)  # to 1, as the policy settles
        layout, device = self.layout, self.networks.online.device
        episodes = self._dealt(self.replay.draw(recipe.replay.batch_groups, self.generator, correction))
        parts = micro_batches(episodes, layout, recipe.optimisation.micro_batch_tokens)
        batches = [make_batch(part, layout).to(device) for part in parts]
        if not self.networks.online.value_head.is_standardised:
            moments = self.processes.together(lambda: value_moments(batches))
            mean, deviation = mean_and_deviation(torch.stack(moments).sum(0))
            if deviation[-1] > ROUNDING:  # returns that are all equal say nothing of their spread: the next may
                self.networks.standardise(mean[:-1], deviation[:-1], deviation[-1])
        terms = round(self.processes.total(sum(loss_terms(batch, recipe.qlearning) for batch in batches)))
        learnt: list[Learnt] = []

        def loss_of(batch: Batch) -> torch.Tensor:
            learnt.append(q_loss(batch, self.networks, recipe.qlearning, exploration))
            return learnt[-1].loss / terms

        optimisation = recipe.optimisation
        warmup = optimisation.warmup_steps
        rising = min(1.0, (step + 0.5) / warmup) if warmup else 1.0
        factor = rising * rate_factor(optimisation.schedule, progress, warmup=0.0)
        try:
            norm = self.optimiser.update(batches, loss_of, factor, self._idle)
        except NotFinite as problem:
            problem.episodes = [e for share in self.processes.together(lambda: episodes) for e in share]
            raise
        self.updates += 1
        self.networks.track(self.updates, recipe.qlearning.target_polyak, recipe.qlearning.target_copy_every)
        reset_every = recipe.qlearning.reference_reset_every
        if reset_every is not None and self.updates % reset_every == 0:
            self.networks.reset_reference()
            self.replay.forget_reference()
        mine = Update(parts, batches, learnt[: len(batches)], terms, norm)
        update = whole_update(self.processes.together(lambda: for_the_record(mine)))
        self.replay.learnt_from(residuals_of_groups(update))
        return update

    def _dealt(self, draws: Sequence[Draw]) -> list[Episode]:
        """This process's share of a batch, measured: groups are dealt out whole, and come from where they are held."""
        times = Counter(draw.number for draw in draws)
        mine = deal(list(times), self.processes.count)[self.processes.rank]
        logged = len(self.replay.log)
        here = {d.number: d.group for d in draws if d.group is not None and (d.number in mine or d.number >= logged)}
        self.collector.measure([episode for group in here.values() for episode in group])
        self.replay.keep_measured(here.values())
        moving = [episode for number, group in here.items() if number not in mine for episode in group]
        here |= self.collector.exchange(moving)
        for draw in draws:
            for episode in here.get(draw.number, ()):
                episode.weight = draw.weight
        return [episode for number in mine for episode in here[number] * times[number]]
