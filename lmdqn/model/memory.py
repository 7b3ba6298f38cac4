"""What a recipe will take, estimated before anything is loaded."""

from dataclasses import dataclass
from typing import Any

import torch

from lmdqn.model.loading import add_lora, auto_class, read_config, scratch_config, train_tokenizer
from lmdqn.recipe import Recipe

ADAM_BYTES = 8  # two float32 moments for each trained parameter
LOGITS_COPIES = 3  # logits, their float32 log-softmax and their gradient


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of an update, activations of the trunk left out (they depend on attention and precision)."""

    parameters: int
    trained_parameters: int
    weights_bytes: int  # online, target and reference
    optimiser_bytes: int  # gradients and Adam's moments
    logits_bytes: int  # one micro-batch, at most

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.optimiser_bytes + self.logits_bytes

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.trained_parameters:,} of them trained; about "
            f"{_size(self.total_bytes)}: three networks {_size(self.weights_bytes)}, gradients and optimiser "
            f"{_size(self.optimiser_bytes)}, logits of a micro-batch up to {_size(self.logits_bytes)}; "
            "activations and decoding caches come on top"
        )


def estimate_memory(recipe: Recipe) -> MemoryEstimate:
    """Build the model on the meta device, from its config alone, and count.

    Raises:
        UserError: the config of a hub model is not in the local cache (nothing is downloaded).
    """
    section = recipe.model
    if section.from_scratch is not None:
        tokenizer = train_tokenizer([], section.from_scratch.vocabulary_size)
        config = scratch_config(section.from_scratch, tokenizer)
        config.vocab_size = section.from_scratch.vocabulary_size
    else:
        config = read_config(section, local_files_only=True)
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config)
        total = sum(p.numel() for p in model.parameters())
        trained = total
        if section.lora is not None:
            model = add_lora(model, section.lora)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}[section.dtype]
    weights = total * size + 3 * trained * size if section.lora is not None else 3 * total * size
    logits = recipe.optimisation.micro_batch_tokens * config.get_text_config().vocab_size * 4 * LOGITS_COPIES
    return MemoryEstimate(total, trained, weights, trained * (size + ADAM_BYTES), logits)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.0f} MiB"
