"""The two sides of an update: the default loss, and a step of transformers' `Trainer` on the same tokens."""

import copy
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from lmdqn.episodes import Batch, SequenceFormat, make_batch, micro_batches
from lmdqn.learn.objective import loss_terms, q_loss
from lmdqn.learn.optimisation import Optimiser
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import trained_parameters
from lmdqn.model.rollout import measure_log_probs
from lmdqn.recipe import OptimisationSection, QLearningSection
from speed.table import Settings


@dataclass(frozen=True)
class Manner:
    """How both sides compute."""

    device: str = "cpu"
    precision: str = "no"  # autocast type
    micro_batch_tokens: int = 2048  # ours; as in the recipes for a CPU
    rows_at_once: int | None = None  # the Trainer's, which adds up gradients over as many passes as it needs; all
    torch_compile: bool = False
    gradient_checkpointing: bool = False

    def finish(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


ON_ONE_CORE = Manner()


def update_and_step(
    loaded: Any, episodes: list[Any], settings: Settings
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Seconds of an update on the episodes, and of a step of `Trainer` on their tokens."""
    supervised = copy.deepcopy(loaded.model)
    update = update_of(loaded, episodes, ON_ONE_CORE)
    step = trainer_step(supervised, episodes, loaded.layout, settings.clock, ON_ONE_CORE)
    return lambda: settings.seconds(update), step


def update_of(loaded: Any, episodes: list[Any], manner: Manner) -> Callable[[], None]:
    """One update of the default loss on the episodes, the optimiser's and the target's step included."""
    recipe = QLearningSection()
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, and another row may have had its own
    accelerator = Accelerator(cpu=manner.device == "cpu", mixed_precision=manner.precision)
    loaded.model.to(manner.device)
    networks = Networks.build(loaded, recipe.beta, 0, OptimisationSection().vocabulary_chunk_mib)
    if manner.torch_compile:
        networks.compile_layers()
    if manner.gradient_checkpointing:
        networks.online.checkpoint_layers()
    with accelerator.autocast():
        measure_log_probs(networks.reference, episodes, loaded.layout, manner.micro_batch_tokens)
    heads = list(networks.online.value_head.parameters())
    groups = [(trained_parameters(networks.online), 1e-4), (heads, 1e-3)]
    optimiser = Optimiser(accelerator, groups, (0.9, 0.95), 0.0, 1.0)

    def update() -> None:
        batches = [batch.to(networks.online.device) for batch in batches_of(episodes, loaded.layout, manner)]
        terms = sum(loss_terms(batch, recipe) for batch in batches)
        optimiser.update(batches, lambda b: q_loss(b, networks, recipe, Exploration()).loss / terms, 1.0)
        networks.track(1, 0.05, None)
        manner.finish()

    return update


def batches_of(episodes: list[Any], layout: SequenceFormat, manner: Manner) -> list[Batch]:
    """What our side passes through the network, on the CPU."""
    return [make_batch(part, layout) for part in micro_batches(episodes, layout, manner.micro_batch_tokens)]


def trainer_step(
    model: Any, episodes: list[Any], layout: SequenceFormat, clock: Callable[[], float], manner: Manner
) -> Callable[[], float]:
    """A step of `Trainer` on all episodes, by its own clock: the second step of two."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rows = [_row(episode, layout) for episode in episodes]
    at_once = manner.rows_at_once or len(rows)

    class StepClock(TrainerCallback):
        began = 0.0
        took = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            manner.finish()
            self.took = clock() - self.began

    def step() -> float:
        watch = StepClock()
        arguments = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=at_once, max_steps=2, save_strategy="no", report_to=[],
            gradient_accumulation_steps=math.ceil(len(rows) / at_once), disable_tqdm=True, logging_strategy="no",
            use_cpu=manner.device == "cpu", bf16=manner.precision == "bf16", torch_compile=manner.torch_compile,
            dataloader_drop_last=False,
        )  # fmt: skip
        collate = _Collate(layout.pad_id)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows * 2, data_collator=collate, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # or the next would wrap it again
        return watch.took

    return patch.dict(os.environ)(step)  # precision and compiler, which it leaves there for whatever comes next


def _row(episode: Any, layout: SequenceFormat) -> dict[str, torch.Tensor]:
    """An episode as supervised fine-tuning reads it: the loss is on the response alone."""
    prompt, response = torch.tensor(episode.example.prompt_ids), torch.tensor(episode.response_ids)
    if layout.is_seq2seq:
        return {"input_ids": prompt, "labels": response}
    return {"input_ids": torch.cat([prompt, response]), "labels": torch.cat([torch.full_like(prompt, -100), response])}


@dataclass(frozen=True)
class _Collate:
    """Rows as one batch, padded on the right."""

    pad_id: int

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
        return {
            "input_ids": torch.nn.utils.rnn.pad_sequence(ids, True, self.pad_id),
            "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], True),
            "labels": torch.nn.utils.rnn.pad_sequence(labels, True, -100),
        }
