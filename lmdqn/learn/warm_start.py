"""The MLE phase: plain supervised fine-tuning on the references, so that Q-learning starts from a fair policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from lmdqn.episodes import Episode, Example, SequenceFormat, demonstration, make_batch, micro_batches, shortest_episode
from lmdqn.errors import NotFinite
from lmdqn.learn.budget import Budget
from lmdqn.learn.checkpoint import AfterStep
from lmdqn.learn.learning_rates import rate_factor
from lmdqn.learn.optimisation import Optimiser, Skips
from lmdqn.learn.processes import Processes
from lmdqn.learn.prompt_draw import ExampleWalk
from lmdqn.model.qnetwork import QNetwork, response_log_probs, trained_parameters
from lmdqn.recipe import Recipe, WarmStartSection
from lmdqn.results.tracking import Tracker


@dataclass
class WarmStart:
    """Trains `network` on every reference for the recipe's epochs; of several tasks, in proportion to their weights.

    An epoch is as many examples as there are in all tasks together. The model's own dropout is on. The rate rises
    linearly, then falls linearly to zero.
    """

    recipe: Recipe
    network: QNetwork
    examples: Sequence[Example]
    layout: SequenceFormat
    accelerator: Accelerator
    tracker: Tracker
    processes: Processes = field(init=False)
    optimiser: Optimiser = field(init=False)
    skips: Skips = field(init=False)
    generator: torch.Generator = field(init=False)  # of the order of the examples
    budget: Budget = field(init=False)
    step: int = field(init=False, default=0)
    _walk: ExampleWalk = field(init=False)
    _dropout: dict[str, Tensor] | None = field(init=False, default=None)  # states of torch's own generators

    def __post_init__(self) -> None:
        optimisation = self.recipe.optimisation
        self.processes = Processes(self.accelerator)
        self.skips = Skips(optimisation.max_skipped)
        self.optimiser = Optimiser(
            self.accelerator,
            [(trained_parameters(self.network), self.settings.learning_rate)],
            optimisation.adam_betas,
            optimisation.weight_decay,
            optimisation.clip_norm,
            self.network,
        )
        self.generator = torch.Generator().manual_seed(self.recipe.seed)
        self._walk = ExampleWalk(
            self.examples,
            self.recipe.task_weights,
            "uniform",
            self.generator,
        )
        self._start_clock(0.0)

    @property
    def settings(self) -> WarmStartSection:
        assert self.recipe.warm_start is not None
        return self.recipe.warm_start

    def run(self, after_step: AfterStep) -> float:
        """Learn until the budget is spent; gives the seconds of learning, those of `after_step` not counted."""
        recipe, budget = self.recipe, self.budget
        lessons = [
            [demonstration(example, k, group, self.layout.eos_ids) for k in range(len(example.references))]
            for group, example in enumerate(self.examples)
        ]
        self.network.train()
        with self.tracker.phase("MLE", budget.max_steps, budget.max_seconds), torch.random.fork_rng():
            _seed_dropout(recipe.seed, self._dropout)
            while not budget.spent(self.step):
                chosen = [lessons[i] for i in self._walk.next(self.settings.batch_examples)]
                factor = rate_factor("linear", budget.progress(self.step + 0.5), self.settings.warmup_share)
                self.step += 1
                record = {"step": self.step, "seconds": budget.seconds, "rate_factor": factor}
                try:
                    record["loss"] = self._update(chosen, factor)
                    self.skips.in_a_row = 0
                except NotFinite as problem:
                    problem.episodes = [episode for lesson in chosen for episode in lesson]
                    self.skips.note(problem)
                    record["skipped_updates"] = self.skips.total
                self.tracker.log("mle", record, write=self.step % recipe.output.log_every_steps == 0)
                with budget.paused():
                    after_step(self.step, budget.spent(self.step), False)
        self.network.eval()
        return budget.seconds

    def state(self) -> dict[str, Any]:
        """All that the rest of the phase depends on, for a checkpoint; taken while `run` runs."""
        return {
            "step": self.step,
            "seconds": self.budget.seconds,
            "networks": {"online": self.network.weights()},
            "optimiser": self.optimiser.state(),
            "generator": self.generator.get_state(),
            "walk": self._walk.state(),
            "dropout": _dropout_state(),
            "skips": self.skips.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave."""
        self.step = state["step"]
        self._start_clock(state["seconds"])
        self.network.restore(state["networks"]["online"])
        self.optimiser.restore(state["optimiser"])
        self.generator.set_state(state["generator"])
        self._walk.restore(state["walk"])
        self._dropout = state["dropout"]
        self.skips.restore(state["skips"])

    def _start_clock(self, already_s: float) -> None:
        steps = math.ceil(self.settings.epochs * len(self.examples) / self.settings.batch_examples)
        self.budget = Budget(steps, self.settings.max_seconds, already_s, self.processes.of_main)

    def _update(self, chosen: Sequence[list[Episode]], factor: float) -> float:
        """One MLE step, each process on its share; gives the loss in nats a token."""
        tokens = sum(len(episode.response_ids) for lesson in chosen for episode in lesson)
        mine = [episode for lesson in self.processes.share(chosen) for episode in lesson]
        losses: list[float] = []

        def loss_of(part: list[Episode]) -> Tensor:
            batch = make_batch(part, self.layout).to(self.network.device)
            loss = -response_log_probs(batch, self.network(batch)).sum()
            losses.append(float(loss.detach()) / tokens)
            return loss / tokens

        parts = micro_batches(mine, self.layout, self.recipe.optimisation.micro_batch_tokens)
        self.optimiser.update(parts, loss_of, factor, [shortest_episode(self.examples, self.layout)])
        return self.processes.total(sum(losses[: len(parts)]))


def _dropout_state() -> dict[str, Tensor]:
    """torch's own generators, which dropout draws from: of the CPU, and of every GPU."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda:{i}": state for i, state in enumerate(gpus)}}


def _seed_dropout(seed: int, saved: dict[str, Tensor] | None) -> None:
    torch.manual_seed(seed)
    for device, state in (saved or {}).items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
