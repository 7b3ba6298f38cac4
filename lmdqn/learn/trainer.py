"""The Q-learning phase: roll out, score, replay, update, track. Someone who knows DQN should know it at a glance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from accelerate import Accelerator

from lmdqn.episodes import Example, make_batch, micro_batches
from lmdqn.errors import NotFinite
from lmdqn.learn.behaviour import fit_sharpness
from lmdqn.learn.budget import Budget
from lmdqn.learn.checkpoint import AfterStep
from lmdqn.learn.collector import Collector
from lmdqn.learn.continuation import Continuation
from lmdqn.learn.guards import Guards
from lmdqn.learn.learning_rates import default_rate, value_head_rate
from lmdqn.learn.optimisation import Optimiser, Skips
from lmdqn.learn.processes import Processes
from lmdqn.learn.replay import Group, Replay, most_telling
from lmdqn.learn.step_record import Update, rollout_record, update_record
from lmdqn.learn.updater import Updater
from lmdqn.model.exploration import Exploration, exploration_at
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import trained_parameters
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import Recipe
from lmdqn.results.calibration import Calibration
from lmdqn.results.tracking import Tracker
from lmdqn.text.rewards import TaskRewards

Validate = Callable[[], dict[str, float]]  # metrics of the target network on the validation split
BestState = Callable[[], dict[str, Any]]  # a trainer's state when it validated best
_PARTS = (
    "networks",
    "optimiser",
    "generators",
    "collector",
    "calibration",
    "skips",
    "guards",
)  # of a trainer, each with a state of its own; the replay's is asked of all processes


@dataclass
class Generators:
    """The sources of randomness in the phase, by name; that of a rollout follows from the seed and its groups."""

    prompts: torch.Generator
    replay: torch.Generator

    @classmethod
    def seeded(cls, seed: int) -> "Generators":
        return cls(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 2))

    def state(self) -> dict[str, torch.Tensor]:
        """Every generator's, for a checkpoint."""
        return {f.name: getattr(self, f.name).get_state() for f in fields(self)}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for name, of_generator in state.items():
            getattr(self, name).set_state(of_generator)


@dataclass
class Trainer:
    """Token-level DQN on a language model: owns the three networks, the replay and the schedules of one phase."""

    recipe: Recipe
    networks: Networks
    rollout: Rollout
    examples: Sequence[Example]
    reward: TaskRewards
    accelerator: Accelerator
    tracker: Tracker
    log: Sequence[Group] = ()  # of offline learning: a list is held in memory, anything else is left where it is
    processes: Processes = field(init=False)
    collector: Collector = field(init=False)
    replay: Replay = field(init=False)
    optimiser: Optimiser = field(init=False)
    updater: Updater = field(init=False)
    skips: Skips = field(init=False)
    guards: Guards = field(init=False)
    generators: Generators = field(init=False)
    budget: Budget = field(init=False)
    calibration: Calibration = field(init=False)
    step: int = field(init=False, default=0)
    best: float | None = field(init=False, default=None)  # validation so far; None before the first
    checks_without_better: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        optimisation = self.recipe.optimisation
        online = self.networks.online
        rate = optimisation.learning_rate or default_rate(online)
        value_rate = value_head_rate(online, self.recipe.qlearning.value_learning_rate)
        self.processes = Processes(self.accelerator)
        self.guards = Guards(self.recipe.guards)
        self.skips = Skips(optimisation.max_skipped)
        self.optimiser = Optimiser(
            self.accelerator,
            [(trained_parameters(online), rate), (list(online.value_head.parameters()), value_rate)],
            optimisation.adam_betas,
            optimisation.weight_decay,
            optimisation.clip_norm,
            online,
        )
        self.replay = Replay(self.recipe.replay, self.log, self.processes.holds)
        self.generators = Generators.seeded(self.recipe.seed)
        self.collector = Collector(
            self.recipe,
            self.networks,
            self.rollout,
            self.examples,
            self.reward,
            self.accelerator,
            self.processes,
            self.generators.prompts,
        )
        self.collector.groups_made = len(self.log)  # the log's groups have the numbers before
        self.updater = Updater(
            self.recipe,
            self.networks,
            self.replay,
            self.collector,
            self.optimiser,
            self.processes,
            self.generators.replay,
            self.rollout.layout,
            self.examples,
        )
        self._start_clock(0.0)
        self.calibration = Calibration(self.recipe.qlearning)
        online.eval()  # no dropout: rollouts and updates must see the same policy

    def run(self, validate: Validate, after_step: AfterStep, best_state: BestState | None = None) -> float:
        """Learn until the budget is spent or patience runs out; gives the seconds of learning.

        `after_step` is called after each step, and once before the first; its time is not counted, nor that of
        `validate`. Without `best_state`, guards cannot go back to it.
        """
        recipe, budget = self.recipe, self.budget
        if isinstance(self.log, list):
            self.collector.measure([episode for group in self.log for episode in group])
        if self.best is None:
            if recipe.optimisation.learning_rate is None:
                self.tracker.say(f"learning rate of the model: {default_rate(self.networks.online):.2g}")
            scores, _ = self._validate(validate)
            self.tracker.log("dqn", {"step": 0, "seconds": 0.0, **scores})
            with budget.paused():
                after_step(0, self.is_over, True)
        with self.tracker.phase("DQN", budget.max_steps, budget.max_seconds):
            is_over = self.is_over
            while not is_over:
                record, better = self._step(), False
                self._watch(record, best_state)
                is_spent = budget.spent(self.step)  # asked once: the clock goes on
                if is_evaluated := self.step % recipe.evaluation.every_steps == 0 or is_spent:
                    scores, better = self._validate(validate)
                    record |= scores
                is_due = self.step % recipe.output.log_every_steps == 0
                self.tracker.log("dqn", record, write=is_due or is_evaluated)
                is_over = is_spent or self._has_ended_early
                with budget.paused():
                    after_step(self.step, is_over, better)
        return budget.seconds

    def _watch(self, record: dict[str, float], best_state: BestState | None) -> None:
        """Say which guards fire, and go back to the best networks where the recipe wants that."""
        alarms = self.guards.check(record)
        for alarm in alarms:
            self.tracker.say(f"step {self.step}: {alarm} (guards.action={self.recipe.guards.action})")
        if alarms and best_state is not None and self.recipe.guards.action == "best":
            best = best_state()
            self.networks.restore(best["networks"])
            self.optimiser.restore(best["optimiser"])
            if self.recipe.qlearning.reference_reset_every is not None:
                self.replay.forget_reference()  # it may have been reset since
            self.collector.forget_waiting()  # the networks that are given up wrote it
            self.guards.start_again()

    def _step(self) -> dict[str, float]:
        """Roll out, keep, update; gives the step's line of `metrics.jsonl`."""
        exploration = self.exploration
        try:
            groups = self._roll_out(exploration)
            count = self.recipe.replay.updates_per_rollout if self._may_learn else 0
            progress = self.budget.progress(self.step + 0.5)  # its middle: where the rate falls to zero, all steps move
            updates = [self.updater.update(progress, self.step, exploration) for _ in range(count)]
        except NotFinite as problem:
            self.step += 1
            self.skips.note(problem)
            self.tracker.say(f"step {self.step} was skipped: {problem}")
            return {"step": self.step, "seconds": self.budget.seconds, "skipped_updates": self.skips.total}
        self.step += 1
        self.skips.in_a_row = 0
        if updates:
            self.calibration.add(self.step, updates[0], {group[0].group for group in groups})
        return self._record(groups, updates, exploration)

    def _roll_out(self, exploration: Exploration) -> list[Group]:
        """This step's new episodes, which join the replay; offline, only the steps that begin a round have any."""
        offline = self.recipe.offline
        if offline is not None:
            begun, within = divmod(self.step, offline.steps_per_round)
            if within or not 0 < begun <= offline.rounds:
                return []
            exploration = self._bounded(exploration)
        groups = self.collector.new_groups(exploration)
        self.replay.add([most_telling(group, self.recipe.replay.kept_share) for group in groups])
        return groups

    def _bounded(self, exploration: Exploration) -> Exploration:
        """The behaviour policy of a round: held to the log where the recipe asks for it."""
        assert self.recipe.offline is not None
        most = self.recipe.offline.boltzmann_js_nats
        if most is None:
            return exploration
        numbers = torch.randperm(len(self.log), generator=self.generators.replay)[: self.recipe.replay.batch_groups]
        episodes = [episode for number in numbers.tolist() for episode in self.log[number]]
        self.collector.measure(episodes)
        layout, device = self.rollout.layout, self.networks.online.device
        parts = micro_batches(episodes, layout, self.recipe.optimisation.micro_batch_tokens)
        batches = [make_batch(part, layout).to(device) for part in parts]
        with self.accelerator.autocast():
            sharpness, js = fit_sharpness(self.networks, batches, most)
        self.tracker.say(f"step {self.step}: rolling out at sharpness {sharpness:.2f}, {js:.4f} nats from the log")
        return Exploration(sharpness=sharpness)  # what was measured: no temperature or bound of the recipe's

    @property
    def is_over(self) -> bool:
        """The budget is spent, patience has run out, or a guard has ended it."""
        return self.budget.spent(self.step) or self._has_ended_early

    @property
    def _has_ended_early(self) -> bool:
        patience = self.recipe.evaluation.patience
        return self.guards.stopped or (patience is not None and self.checks_without_better >= patience)

    @property
    def _may_learn(self) -> bool:
        held, wanted = len(self.replay), self.recipe.replay.learning_starts_episodes
        return len(self.log) > 0 or held >= wanted or self.replay.is_full

    def state(self) -> dict[str, Any]:
        """All that the rest of the phase depends on, for a checkpoint. All processes must ask for it."""
        everywhere = self.collector.exchange(list(self.replay.episodes()))
        return {
            "step": self.step,
            "updates": self.updater.updates,
            "seconds": self.budget.seconds,
            "best": self.best,
            "checks_without_better": self.checks_without_better,
            **{part: getattr(self, part).state() for part in _PARTS},
            "replay": self.replay.state(everywhere),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave."""
        self.step, self.updater.updates = state["step"], state["updates"]
        self.best, self.checks_without_better = state["best"], state["checks_without_better"]
        for part in (*_PARTS, "replay"):
            getattr(self, part).restore(state[part])
        self._start_clock(state["seconds"])

    def go_on_from(self, finished: Continuation) -> None:
        """Begin with the replay of a finished run and the episodes that join it; networks are those it kept already."""
        before = len(self.log)  # the log's groups have the numbers before
        for number, group in enumerate(finished.episodes, start=finished.collector["groups_made"]):
            for episode in group:
                episode.group = number
        self.replay.take_over(finished.replay, before, finished.episodes)
        if finished.reference_moved:
            self.replay.forget_reference()
        self.collector.go_on_from(finished.collector, len(finished.episodes))

    @property
    def exploration(self) -> Exploration:
        """How this step's rollout explores."""
        return exploration_at(self.recipe.rollout, self.step)

    def _start_clock(self, already_s: float) -> None:
        self.budget = Budget(
            self.recipe.qlearning.max_steps, self.recipe.qlearning.max_seconds, already_s, self.processes.of_main
        )

    def _validate(self, validate: Validate) -> tuple[dict[str, float], bool]:
        """The target network's scores as they are logged, and whether it is the best so far."""
        self.collector.settle()
        with self.budget.paused():
            scores = validate()
        score = scores[self.recipe.evaluation.metric]
        better = self.best is None or score > self.best
        self.checks_without_better = 0 if better else self.checks_without_better + 1
        if better:
            self.best = score
        return {f"validation_{name}": value for name, value in scores.items()}, better

    def _record(self, groups: Sequence[Group], updates: Sequence[Update], exploration: Exploration) -> dict[str, float]:
        """The step's line of `metrics.jsonl`."""
        sampled = [e for group in groups for e in group if not e.demonstration]
        record = {"step": self.step, "seconds": self.budget.seconds, "replay_episodes": len(self.replay)}
        if sampled:
            record |= rollout_record(groups)
            rollouts = self.recipe.offline.rollouts_after(self.step) if self.recipe.offline else self.step
            record["episodes_per_s"] = rollouts * len(sampled) / self.budget.seconds
        if updates:
            record |= update_record(updates, {e.group for e in sampled})
        if exploration.epsilon is not None:
            record["epsilon"] = exploration.epsilon
        if self.skips.total:
            record["skipped_updates"] = self.skips.total
        return record
