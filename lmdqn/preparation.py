"""Before a run: its recipe, data and model read, found sound and put together, and nothing written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from lmdqn.answering import rollout_of
from lmdqn.episodes import Episode, Example, make_batch, shortest_episode
from lmdqn.errors import UserError
from lmdqn.learn.continuation import Continuation, kept_model, read_continuation
from lmdqn.learn.launch import sharding_of_launch
from lmdqn.learn.processes import Processes
from lmdqn.model.compiling import check_compiler
from lmdqn.model.loading import LoadedModel, load_model
from lmdqn.model.networks import Networks
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import DataSection, Recipe, differing_keys, load_recipe
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.trackers import Trackers, accelerator_for, check_installed
from lmdqn.results.tracking import Tracker
from lmdqn.text.data import SPLITS, Pair, Row, load_pairs
from lmdqn.text.episode_log import EpisodeLog, read_logs
from lmdqn.text.prompts import encode_examples
from lmdqn.text.rewards import TaskRewards

# What may change when a run goes on: where it is kept, and how long it goes.
FREE_KEYS = (
    "output.",
    "decoding.",
    "qlearning.max_",
    "warm_start.epochs",
    "warm_start.max_seconds",
    "evaluation.patience",
)


@dataclass
class Parts:
    """What a run works with."""

    recipe: Recipe
    folder: RunFolder
    rewards: TaskRewards
    accelerator: Accelerator
    tracker: Tracker
    trackers: Trackers
    tokenizer: Any
    rollout: Rollout
    networks: Networks
    examples: dict[str, list[Example]]  # by split, those of several tasks one after the other
    log: Sequence[list[Episode]]  # of offline learning
    finished: Continuation | None  # where the recipe learns on from another run


def prepare(recipe: Recipe, tracker: Tracker | None, resume: bool) -> Parts:
    """Read and build everything, and write nothing. With several processes, none goes on before all have."""
    check_installed(recipe.output.trackers)
    sharding = sharding_of_launch(recipe)
    processes = Processes(accelerator_for(recipe))
    tracker = tracker or (Tracker() if processes.is_main else Tracker(Console(quiet=True)))
    if processes.count > 1:
        tracker.say(f"learning in {processes.count} processes")
    prepared: list[Parts] = []
    device = processes.accelerator.device
    at_first = device if sharding is None else torch.device("cpu")
    processes.together(lambda: prepared.append(_prepare_alone(recipe, tracker, resume, processes, at_first)))
    parts = prepared[0]
    if sharding is not None:
        layout = parts.rollout.layout
        trial = make_batch([shortest_episode(parts.examples["train"], layout)], layout)
        parts.networks.shard(device, sharding, trial)
        tracker.say(f"weights, gradients and optimiser are shared out over the processes ({sharding})")
        if sharding.zero_stage == 3 and recipe.optimisation.vocabulary_chunk_mib is not None:
            tracker.say("logits come at once: optimisation.vocabulary_chunk_mib does not go with ZeRO-3")
    return parts


def _prepare_alone(recipe: Recipe, tracker: Tracker, resume: bool, processes: Processes, device: torch.device) -> Parts:
    if not resume:
        recipe.check_new()
    finished = None if recipe.continued is None else read_continuation(recipe)
    folder = RunFolder.check(recipe.output, resume)
    if resume and folder.recipe.exists():
        _check_same(recipe, folder)
    for key, count in _shared(recipe):
        if count < processes.count:
            raise UserError(f"{key}={count} is too few for {processes.count} processes: each needs a share")
    rewards = TaskRewards(recipe.every_task)
    accelerator = processes.accelerator
    pairs = {
        name: {split: load_pairs(task.data, split, recipe.seed) for split in SPLITS}
        for name, task in recipe.every_task.items()
    }
    logs = read_logs(recipe)
    texts = [text for of_task in pairs.values() for text in _texts(of_task["train"])]
    section = recipe.model if finished is None else kept_model(recipe, finished.folder)
    loaded = load_model(section, texts, recipe.seed, recipe.max_response_tokens)
    if not resume:
        _check_precision(recipe, loaded.model)
    loaded.model.to(device)
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for name, task in recipe.every_task.items():
        longest = recipe.max_response_tokens
        for split, encoded in _encode_all(pairs[name], task.data, loaded, tracker, name, longest).items():
            examples[split] += encoded
    log = _offline_groups(recipe, logs, loaded, examples["train"], tracker)
    if finished is not None:
        known = [*(episode.example for episode in finished.replay["episodes"]), *examples["train"]]
        finished.episodes = _groups_that_join(recipe, logs, loaded, known, tracker)
    return Parts(
        recipe,
        folder,
        rewards,
        accelerator,
        tracker,
        Trackers(accelerator, recipe),
        loaded.tokenizer,
        rollout_of(loaded, recipe),
        _build_networks(recipe, loaded, finished),
        examples,
        log,
        finished,
    )


def _build_networks(recipe: Recipe, loaded: LoadedModel, finished: Continuation | None) -> Networks:
    networks = Networks.build(
        loaded,
        recipe.qlearning.beta,
        recipe.seed,
        recipe.optimisation.vocabulary_chunk_mib,
        recipe.qlearning.value_quantiles or 1,
        keep_first=recipe.qlearning.reference_reset_every is not None,
        target_dtype=recipe.qlearning.target_dtype,
    )
    if recipe.optimisation.torch_compile:
        check_compiler(networks.online.device)
        networks.compile_layers()
    if recipe.optimisation.gradient_checkpointing:
        networks.online.checkpoint_layers()
    if finished is not None:
        networks.go_on_from(finished.networks)
    return networks


def _check_precision(recipe: Recipe, model: Any) -> None:
    """Refuse weights that cannot move by steps as small as learning takes."""
    if recipe.model.lora is not None:  # adapters are in float32
        return
    held = next(model.parameters()).dtype
    if held == torch.float16:
        raise UserError(
            "all weights learn, and in float16 AdamW's steps are lost or infinite: set model.dtype=float32, with "
            "optimisation.mixed_precision=fp16 to compute in 16 bits, or model.lora"
        )
    if held == torch.bfloat16 and recipe.qlearning.target_polyak is not None:
        raise UserError(
            "all weights learn, and in bfloat16 the small steps of qlearning.target_polyak are rounded away: set "
            "model.dtype=float32, with optimisation.mixed_precision=bf16 to compute in 16 bits, or target_polyak=null "
            "and target_copy_every"
        )


def _shared(recipe: Recipe) -> list[tuple[str, int]]:
    """What processes share out."""
    shared = [("rollout.prompts", recipe.rollout.prompts), ("replay.batch_groups", recipe.replay.batch_groups)]
    if recipe.warm_start is not None:
        shared.append(("warm_start.batch_examples", recipe.warm_start.batch_examples))
    return shared


def _offline_groups(
    recipe: Recipe,
    logs: Mapping[str, Sequence[Row]],
    loaded: LoadedModel,
    examples: Sequence[Example],
    tracker: Tracker,
) -> Sequence[list[Episode]]:
    """The offline log's groups, in memory or on disk; none where the recipe has no log."""
    if recipe.offline is None:
        return ()
    log = _open_log(recipe.offline.path, logs["offline.path"], recipe, loaded, examples)
    tracker.say(f"log: {len(log.rows)} episodes of {len(log)} prompts")
    return list(log) if recipe.offline.in_memory else log


def _groups_that_join(
    recipe: Recipe,
    logs: Mapping[str, Sequence[Row]],
    loaded: LoadedModel,
    examples: Sequence[Example],
    tracker: Tracker,
) -> list[list[Episode]]:
    """The groups that join the replay of a continued run."""
    assert recipe.continued is not None
    if recipe.continued.episodes is None:
        return []
    log = _open_log(recipe.continued.episodes, logs["continued.episodes"], recipe, loaded, examples)
    tracker.say(f"joining the replay: {len(log.rows)} episodes of {len(log)} prompts")
    return list(log)


def _open_log(
    path: str, rows: Sequence[Row], recipe: Recipe, loaded: LoadedModel, examples: Sequence[Example]
) -> EpisodeLog:
    longest = recipe.max_response_tokens
    return EpisodeLog(path, rows, loaded.tokenizer, loaded.layout, examples, longest, recipe.qlearning)


def _check_same(recipe: Recipe, folder: RunFolder) -> None:
    differing = [key for key in differing_keys(recipe, load_recipe(folder.recipe)) if not key.startswith(FREE_KEYS)]
    if differing:
        raise UserError(
            f"the recipe is not that of the run in {folder.path}: {', '.join(differing)} differ; a resumed run may "
            "change its output and budget alone"
        )


def _texts(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.source, *pair.references)]


def _encode_all(
    pairs: dict[str, list[Pair]], data: DataSection, loaded: LoadedModel, tracker: Tracker, task: str, longest: int
) -> dict[str, list[Example]]:
    examples: dict[str, list[Example]] = {}
    of_task = f"{task}, " if task else ""
    for split, of_split in pairs.items():
        examples[split], cuts = encode_examples(of_split, data, loaded.tokenizer, loaded.layout, task, longest)
        if cuts:
            tracker.say(f"{of_task}{split}: {cuts}")
    sizes = ", ".join(f"{len(examples[split])} {split}" for split in SPLITS)
    tracker.say(f"{of_task}examples: {sizes}")
    return examples
