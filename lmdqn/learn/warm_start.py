"""The MLE phase: plain supervised fine-tuning on the references, so that Q-learning starts from a fair policy."""

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from lmdqn.episodes import Episode, Example, SequenceFormat, demonstration, make_batch, micro_batches
from lmdqn.learn.budget import Budget
from lmdqn.learn.optimisation import Optimiser, rate_factor
from lmdqn.model.qnetwork import QNetwork, response_log_probs, trained_parameters
from lmdqn.recipe import Recipe
from lmdqn.results.tracking import Tracker


def warm_start(
    recipe: Recipe,
    network: QNetwork,
    examples: Sequence[Example],
    layout: SequenceFormat,
    accelerator: Accelerator,
    tracker: Tracker,
) -> float:
    """Train `network` on every reference for the recipe's epochs; gives the seconds it took.

    The model's own dropout is on. The rate rises linearly, then falls linearly to zero.
    """
    settings = recipe.warm_start
    assert settings is not None
    lessons = [
        [demonstration(example, k, group, layout.eos_ids) for k in range(len(example.references))]
        for group, example in enumerate(examples)
    ]
    steps = math.ceil(settings.epochs * len(lessons) / settings.batch_examples)
    optimisation = recipe.optimisation
    optimiser = Optimiser(
        accelerator,
        [(trained_parameters(network), settings.learning_rate)],
        optimisation.adam_betas,
        optimisation.weight_decay,
        optimisation.clip_norm,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    order: list[int] = []
    budget = Budget(steps, settings.max_seconds)
    step = 0
    network.train()
    with tracker.phase("MLE", budget.max_steps, budget.max_seconds), torch.random.fork_rng():
        torch.manual_seed(recipe.seed)  # dropout
        while not budget.spent(step):
            while len(order) < settings.batch_examples:
                order += torch.randperm(len(lessons), generator=generator).tolist()
            batch, order = order[: settings.batch_examples], order[settings.batch_examples :]
            episodes = [episode for i in batch for episode in lessons[i]]
            factor = rate_factor("linear", budget.progress(step + 1), settings.warmup_share)
            loss = _update(optimiser, network, episodes, layout, recipe, factor)
            step += 1
            record = {"step": step, "seconds": budget.seconds, "loss": loss, "rate_factor": factor}
            tracker.log("mle", record, write=step % recipe.output.log_every_steps == 0)
    network.eval()
    return budget.seconds


def _update(
    optimiser: Optimiser,
    network: QNetwork,
    episodes: Sequence[Episode],
    layout: SequenceFormat,
    recipe: Recipe,
    factor: float,
) -> float:
    """One MLE step; gives the loss in nats a token."""
    tokens = sum(len(e.response_ids) for e in episodes)
    total = 0.0

    def loss_of(part: list[Episode]) -> Tensor:
        nonlocal total
        batch = make_batch(part, layout).to(network.device)
        loss = -response_log_probs(batch, network(batch)).sum()
        total += float(loss.detach()) / tokens
        return loss / tokens

    optimiser.update(micro_batches(episodes, layout, recipe.optimisation.micro_batch_tokens), loss_of, factor)
    return total
