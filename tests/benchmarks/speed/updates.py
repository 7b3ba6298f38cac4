"""An update of the default loss against a step of transformers' Trainer."""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from speed.material import groups_of_references, loaded_model, pairs, texts_of
from speed.table import Line, Settings, compare

MICRO_BATCH_TOKENS = 2048  # as in the recipes for a CPU


def update(settings: Settings) -> Iterator[Line]:
    """One update of the default loss on 16 groups of 4 against one step of transformers' Trainer on their tokens."""
    yield from _updates(settings, ((160, 3, 1500), (256, 6, 8000)), 16)


def update_60m(settings: Settings) -> Iterator[Line]:
    """The same on 4 groups of 4, a step taking seconds."""
    yield from _updates(settings, ((640, 8, 32000),), 4)


def _updates(settings: Settings, sizes: Iterable[tuple[int, int, int]], groups: int) -> Iterator[Line]:
    """Of models of those widths, layers and vocabularies."""
    texts = texts_of(settings.data)
    for width, layers, vocabulary in sizes:
        for lora in (False, True):
            loaded = loaded_model(texts, width, layers, vocabulary, lora)
            size = sum(p.numel() for p in loaded.model.parameters()) / 1e6
            episodes = groups_of_references(pairs(settings.data, groups, 4), loaded)
            tokens = sum(len(e.example.prompt_ids) + len(e.response_ids) for e in episodes)
            turns = settings.alternate(*update_and_step(loaded, episodes, settings))
            fast, slow = ([tokens / took for took in side] for side in turns)
            name = f"update against Trainer's SFT step, {size:.1f}M{' LoRA' if lora else ''}"
            yield compare(name, fast, slow, "tokens/s", ">= 0.9")


def update_and_step(
    loaded: Any, episodes: list[Any], settings: Settings
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of an update on the episodes, and of a step of `Trainer` on their tokens."""
    import copy

    import torch
    from accelerate import Accelerator

    from lmdqn.episodes import make_batch, micro_batches
    from lmdqn.learn.objective import loss_terms, q_loss
    from lmdqn.learn.optimisation import Optimiser
    from lmdqn.model.exploration import Exploration
    from lmdqn.model.networks import Networks
    from lmdqn.model.qnetwork import trained_parameters
    from lmdqn.model.rollout import measure_log_probs
    from lmdqn.recipe import OptimisationSection, QLearningSection

    supervised = copy.deepcopy(loaded.model)
    recipe = QLearningSection()
    networks = Networks.build(loaded, recipe.beta, 0, OptimisationSection().vocabulary_chunk_mib)
    measure_log_probs(networks.reference, episodes, loaded.layout, MICRO_BATCH_TOKENS)
    heads = list(networks.online.value_head.parameters())
    groups = [(trained_parameters(networks.online), 1e-4), (heads, 1e-3)]
    optimiser = Optimiser(Accelerator(cpu=True), groups, (0.9, 0.95), 0.0, 1.0)

    def update() -> None:
        parts = micro_batches(episodes, loaded.layout, MICRO_BATCH_TOKENS)
        batches = [make_batch(part, loaded.layout) for part in parts]
        terms = sum(loss_terms(batch, recipe) for batch in batches)
        optimiser.update(batches, lambda b: q_loss(b, networks, recipe, Exploration()).loss / terms, 1.0)
        networks.track(1, 0.05, None)

    sequences = [torch.tensor([*e.example.prompt_ids, *e.response_ids]) for e in episodes]
    prompts = [len(e.example.prompt_ids) for e in episodes]
    step = _trainer_step(supervised, sequences, prompts, loaded.layout.pad_id, settings.clock)
    return lambda: settings.seconds(update), step


def _trainer_step(
    model: Any, sequences: list[Any], prompts: list[int], pad_id: int, clock: Callable[[], float]
) -> Callable[[], float]:
    """A step of `Trainer` on all sequences as one batch, by its own clock: the second step of two."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rows = []
    for ids, prompt in zip(sequences, prompts, strict=True):
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append({"input_ids": ids, "labels": labels})

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = pad_sequence([row["input_ids"] for row in batch], True, pad_id)
        mask = pad_sequence([row["input_ids"] * 0 + 1 for row in batch], True)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": pad_sequence([r["labels"] for r in batch], True, -100),
        }

    class StepClock(TrainerCallback):
        began = 0.0
        took = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.took = clock() - self.began

    def step() -> float:
        watch = StepClock()
        arguments = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=len(rows), max_steps=2, save_strategy="no", report_to=[],
            disable_tqdm=True, logging_strategy="no", use_cpu=True, dataloader_drop_last=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows * 2, data_collator=collate, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watch.took

    return step
