"""The Q-learning phase: roll out, score, replay, update, track. Someone who knows DQN should know it at a glance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from accelerate import Accelerator

from lmdqn.episodes import Batch, Episode, Example, demonstration, make_batch, micro_batches
from lmdqn.learn.budget import Budget
from lmdqn.learn.match_features import measure_matches
from lmdqn.learn.objective import Learnt, loss_terms, q_loss
from lmdqn.learn.optimisation import Optimiser, rate_factor
from lmdqn.learn.replay import Group, Replay
from lmdqn.learn.step_record import Update, rollout_record, update_record
from lmdqn.model.qnetwork import Networks, trained_parameters
from lmdqn.model.rollout import Exploration, Rollout, measure_reference
from lmdqn.recipe import Recipe
from lmdqn.results.tracking import Tracker
from lmdqn.text.rewards import Reward

Validate = Callable[[], dict[str, float]]  # metrics of the target network on the validation split


@dataclass
class Generators:
    """Every source of randomness in the phase, by name."""

    prompts: torch.Generator
    rollout: torch.Generator
    replay: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> "Generators":
        return cls(
            torch.Generator().manual_seed(seed),
            torch.Generator(device).manual_seed(seed + 1),
            torch.Generator().manual_seed(seed + 2),
        )


@dataclass
class Trainer:
    """Token-level DQN on a language model: owns the three networks, the replay and the schedules of one phase."""

    recipe: Recipe
    networks: Networks
    rollout: Rollout
    examples: Sequence[Example]
    reward: Reward
    accelerator: Accelerator
    tracker: Tracker
    replay: Replay = field(init=False)
    optimiser: Optimiser = field(init=False)
    generators: Generators = field(init=False)
    step: int = field(init=False, default=0)
    updates: int = field(init=False, default=0)
    _prompt_order: list[int] = field(init=False, default_factory=list)
    _running_reward: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        optimisation = self.recipe.optimisation
        rate = optimisation.learning_rate
        online = self.networks.online
        value_rate = rate * self.recipe.qlearning.value_learning_rate_scale
        self.optimiser = Optimiser(
            self.accelerator,
            [(trained_parameters(online), rate), (list(online.value_head.parameters()), value_rate)],
            optimisation.adam_betas,
            optimisation.weight_decay,
            optimisation.clip_norm,
        )
        self.replay = Replay(self.recipe.replay.capacity_episodes)
        self.generators = Generators.seeded(self.recipe.seed, online.device)
        online.eval()  # no dropout: rollouts and updates must see the same policy

    def run(self, validate: Validate) -> float:
        """Learn until the budget is spent or patience runs out; gives the seconds of learning."""
        recipe, metric = self.recipe, self.recipe.evaluation.metric
        budget = Budget(recipe.qlearning.max_steps, recipe.qlearning.max_seconds)
        with budget.paused():
            scores = validate()
        self.tracker.log("dqn", {"step": 0, "seconds": 0.0, **_as_validation(scores)})
        best, checks_without_better = scores[metric], 0
        with self.tracker.phase("DQN", budget.max_steps, budget.max_seconds):
            while not budget.spent(self.step) and checks_without_better != recipe.evaluation.patience:
                groups = self.new_groups()
                self.replay.add(groups)
                updates = [self.update(budget) for _ in range(recipe.replay.updates_per_rollout)]
                self.step += 1
                record = self._record(groups, updates, budget)
                is_last = budget.spent(self.step)
                if is_evaluated := self.step % recipe.evaluation.every_steps == 0 or is_last:
                    with budget.paused():
                        scores = validate()
                    record |= _as_validation(scores)
                    checks_without_better = 0 if scores[metric] > best else checks_without_better + 1
                    best = max(best, scores[metric])
                is_due = self.step % recipe.output.log_every_steps == 0
                self.tracker.log("dqn", record, write=is_due or is_evaluated)
        return budget.seconds

    def new_groups(self) -> list[Group]:
        """Roll out the next prompts, add demonstrations, score and centre: whole groups, ready for the replay."""
        recipe = self.recipe
        examples = self._next_examples(recipe.rollout.prompts)
        first_group = self.step * recipe.rollout.prompts
        with self.accelerator.autocast():
            episodes = self.rollout.sample(
                self.networks.online,
                examples,
                recipe.rollout.samples,
                self.exploration,
                self.generators.rollout,
                first_group,
            )
            for group, example in enumerate(examples, start=first_group):
                for k in self._reference_numbers(example):
                    episodes.append(demonstration(example, k, group, self.rollout.layout.eos_ids))
            measure_reference(
                self.networks.reference, episodes, self.rollout.layout, recipe.optimisation.micro_batch_tokens
            )
        self._score(episodes)
        measure_matches(episodes)
        groups: dict[int, Group] = {}
        for episode in episodes:
            groups.setdefault(episode.group, []).append(episode)
        self._centre(list(groups.values()))
        return list(groups.values())

    @property
    def exploration(self) -> Exploration:
        """How this step's rollout explores."""
        rollout = self.recipe.rollout
        if not rollout.epsilon_greedy:
            return Exploration(rollout.temperature, rollout.top_k)
        decayed = min(1.0, self.step / rollout.epsilon_decay_steps)
        epsilon = rollout.epsilon_start + decayed * (rollout.epsilon_end - rollout.epsilon_start)
        return Exploration(rollout.temperature, rollout.top_k, epsilon)

    def update(self, budget: Budget) -> Update:
        """One update of the online network on a batch from the replay, then of the target network."""
        recipe = self.recipe
        episodes = self.replay.sample(recipe.replay.batch_groups, recipe.replay.fresh_share, self.generators.replay)
        parts = micro_batches(episodes, self.rollout.layout, recipe.optimisation.micro_batch_tokens)
        device = self.networks.online.device
        batches = [make_batch(part, self.rollout.layout).to(device) for part in parts]
        terms = sum(loss_terms(batch, recipe.qlearning) for batch in batches)
        learnt: list[Learnt] = []

        def loss_of(batch: Batch) -> torch.Tensor:
            learnt.append(q_loss(batch, self.networks.online, self.networks.target, recipe.qlearning))
            return learnt[-1].loss / terms

        optimisation = recipe.optimisation
        warmup = optimisation.warmup_steps / max(1, recipe.qlearning.max_steps)
        factor = rate_factor(optimisation.schedule, budget.progress(self.step + 1), warmup)
        norm = self.optimiser.update(batches, loss_of, factor)
        self.updates += 1
        self.networks.track(self.updates, recipe.qlearning.target_polyak, recipe.qlearning.target_copy_every)
        return Update(parts, batches, learnt, terms, norm)

    def _record(self, groups: Sequence[Group], updates: Sequence[Update], budget: Budget) -> dict[str, float]:
        """The step's line of `metrics.jsonl`."""
        sampled = [e for group in groups for e in group if not e.demonstration]
        record = {
            "step": self.step,
            "seconds": budget.seconds,
            **rollout_record(groups),
            **update_record(updates, {e.group for e in sampled}),
            "replay_episodes": len(self.replay),
            "episodes_per_s": self.step * len(sampled) / budget.seconds,
        }
        if (epsilon := self.exploration.epsilon) is not None:
            record["epsilon"] = epsilon
        return record

    def _next_examples(self, count: int) -> list[Example]:
        """The next prompts of an endless walk over shuffled training examples."""
        while len(self._prompt_order) < count:
            self._prompt_order += torch.randperm(len(self.examples), generator=self.generators.prompts).tolist()
        chosen, self._prompt_order = self._prompt_order[:count], self._prompt_order[count:]
        return [self.examples[i] for i in chosen]

    def _reference_numbers(self, example: Example) -> list[int]:
        wanted = self.recipe.replay.demonstrations
        order = torch.randperm(len(example.references), generator=self.generators.prompts)
        return order[:wanted].tolist() if wanted else []

    def _score(self, episodes: Sequence[Episode]) -> None:
        terms = self.reward.terms(
            [e.text for e in episodes], [e.example.references for e in episodes], [e.example.source for e in episodes]
        )
        for i, (episode, total) in enumerate(zip(episodes, self.reward.mix(terms), strict=True)):
            episode.reward = total
            episode.terms = {name: scores[i] for name, scores in terms.items()}

    def _centre(self, groups: Sequence[Group]) -> None:
        """Write each episode's baseline: it moves V by a constant of the prompt and leaves the advantages alone.

        Only sampled rewards count, so that demonstrations, which are better, push no sample down.
        """
        kind = self.recipe.qlearning.baseline
        mean = fmean(e.reward for group in groups for e in group if not e.demonstration)
        self._running_reward = mean if self._running_reward is None else 0.9 * self._running_reward + 0.1 * mean
        for group in groups:
            of_group = fmean(e.reward for e in group if not e.demonstration)
            for episode in group:
                episode.baseline = {"group": of_group, "running": self._running_reward, "none": 0.0}[kind]


def _as_validation(scores: dict[str, float]) -> dict[str, float]:
    return {f"validation_{name}": value for name, value in scores.items()}
