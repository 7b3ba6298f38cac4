"""lmdqn itself, and three lean loops with its batches and optimiser: GRPO, MLE on each group's best, and more MLE."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, stdev

from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from lmdqn.episodes import Episode, Example, SequenceFormat, demonstration, make_batch, micro_batches
from lmdqn.learn.learning_rates import default_rate, rate_factor
from lmdqn.learn.optimisation import Optimiser
from lmdqn.learn.trainer import Trainer
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import QNetwork, response_log_probs, trained_parameters
from lmdqn.recipe import Recipe
from lmdqn.results.tracking import Tracker
from lmdqn.text.rewards import TaskRewards
from versus.arena import Arena, Recorder, Variant

POLYAK = 0.05  # share of the new weights in a lean loop's average, an update: lmdqn's default for its target network
Group = Sequence[Episode]
Write = Callable[[QNetwork, Sequence[Example], int], list[Group]]  # a step's episodes, by prompt
Lessons = Callable[[Group], list[Episode]]  # from a prompt's episodes to those whose reward weighs their likelihood


def run_lmdqn(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    """lmdqn's own Trainer; what is measured is the target network, which is what it ships."""
    networks = Networks.build(arena.fresh(), recipe.qlearning.beta, recipe.seed)
    tracker = Tracker(Console(quiet=True, force_terminal=False))
    accelerator = Accelerator(cpu=True)
    rewards = TaskRewards(recipe.every_task)
    trainer = Trainer(recipe, networks, arena.rollout, arena.examples["train"], rewards, accelerator, tracker)
    variants = {"average": Variant(networks.target.model, networks.target.adapter)}
    episodes_a_step = recipe.rollout.prompts * recipe.rollout.samples

    def after_step(step: int, last: bool, best: bool) -> None:
        """Called once before the first step too, off the trainer's clock."""
        if step == 0:
            recorder.start()
        elif not last:
            recorder.step(step * episodes_a_step, variants)

    trainer.run(lambda: {recipe.evaluation.metric: 0.0}, after_step)
    recorder.finish(trainer.step * episodes_a_step, variants)


def run_lean_grpo(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    """Likelihood weighted by the group's standardised reward (Shao et al. 2024), on policy, token mean, no KL."""
    _run_lean(_sampler(arena, recipe), standardised, arena, recipe, recorder)


def run_best_of_group(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    """MLE on the best sample of each group."""
    _run_lean(_sampler(arena, recipe), best_sample, arena, recipe, recorder)


def run_more_mle(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    """The warm start goes on: MLE on all references of a step's prompts, nothing sampled."""

    def references(online: QNetwork, examples: Sequence[Example], step: int) -> list[Group]:
        eos_ids = arena.rollout.layout.eos_ids
        return [
            [replace(demonstration(example, k, group, eos_ids), reward=1.0) for k in range(len(example.references))]
            for group, example in enumerate(examples)
        ]

    _run_lean(references, list, arena, recipe, recorder)


def standardised(group: Group) -> list[Episode]:
    rewards = [episode.reward for episode in group]
    mean, spread = fmean(rewards), stdev(rewards)
    return [replace(episode, reward=(episode.reward - mean) / (spread + 1e-4)) for episode in group]


def best_sample(group: Group) -> list[Episode]:
    return [replace(max(group, key=lambda episode: episode.reward), reward=1.0)]


def _run_lean(write: Write, lessons: Lessons, arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    """Write, one update on what `lessons` makes of it, and a Polyak average beside the trained weights."""
    networks = Networks.build(arena.fresh(), recipe.qlearning.beta, recipe.seed)
    online, average = networks.online, networks.target
    variants = {"online": Variant(online.model, online.adapter), "average": Variant(average.model, average.adapter)}
    online.eval()  # no dropout, as in lmdqn
    settings = recipe.optimisation
    optimiser = Optimiser(
        Accelerator(cpu=True),
        [(trained_parameters(online), settings.learning_rate or default_rate(online))],
        settings.adam_betas,
        settings.weight_decay,
        settings.clip_norm,
    )
    episodes = step = 0
    recorder.start()
    for examples in arena.prompts(recipe.seed):
        groups = write(online, examples, step)
        learnt = [lesson for group in groups for lesson in lessons(group)]
        factor = rate_factor(settings.schedule, recorder.budget.progress(0), 0.0)
        _update(optimiser, online, learnt, arena.rollout.layout, settings.micro_batch_tokens, factor)
        episodes, step = episodes + sum(map(len, groups)), step + 1
        networks.track(step, POLYAK, None)
        if recorder.spent:
            break
        recorder.step(episodes, variants)
    recorder.finish(episodes, variants)


def _sampler(arena: Arena, recipe: Recipe) -> Write:
    """Samples of each prompt, scored."""
    samples = recipe.rollout.samples
    exploration = Exploration(recipe.rollout.temperature, recipe.rollout.top_k)

    def write(online: QNetwork, examples: Sequence[Example], step: int) -> list[Group]:
        numbers = range(step * len(examples), (step + 1) * len(examples))
        episodes = arena.rollout.sample(online, examples, samples, exploration, recipe.seed, numbers)
        rewards = arena.reward(
            [e.text for e in episodes], [e.example.references for e in episodes], [e.example.source for e in episodes]
        )
        scored = [replace(episode, reward=r) for episode, r in zip(episodes, rewards, strict=True)]
        return [scored[i : i + samples] for i in range(0, len(scored), samples)]

    return write


def _update(
    optimiser: Optimiser,
    network: QNetwork,
    lessons: list[Episode],
    layout: SequenceFormat,
    micro_batch_tokens: int,
    factor: float,
) -> None:
    """Raise the log-likelihood of each episode by its reward, mean over tokens."""
    tokens = sum(len(episode.response_ids) for episode in lessons)

    def loss_of(part: list[Episode]) -> Tensor:
        batch = make_batch(part, layout).to(network.device)
        log_likelihood = response_log_probs(batch, network(batch)).sum(1)  # (B,)
        return -(batch.rewards.sum(1) * log_likelihood).sum() / tokens

    optimiser.update(micro_batches(lessons, layout, micro_batch_tokens), loss_of, factor)
