"""What a recipe will take, estimated before anything is loaded."""

import math
from dataclasses import dataclass
from typing import Any

from lmdqn.model.counting import Size, size_of
from lmdqn.recipe import ModelSection, Recipe

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 4}  # of a weight
ADAM_BYTES = 8  # two float32 moments for each trained parameter
TOKEN_BYTES = 9  # of a packed response: its id and its text
EPISODE_BYTES = 150  # packed: rewards and their terms, places in columns, its share of the group
OPEN_TOKEN_BYTES = 80  # of the newest rollout: an int of Python's, its place in a list, features of the references
OPEN_EPISODE_BYTES = 2500  # the object, its tensors' headers, its text and its reward's terms
LOGITS_COPIES = 3  # logits, their float32 log-softmax and their gradient


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of an update, activations of the trunk left out (they depend on attention and precision)."""

    parameters: int
    trained_parameters: int
    weights_bytes: int  # online, target, reference, and the first one where references are reset
    optimiser_bytes: int  # gradients and Adam's moments
    logits_bytes: int  # one micro-batch, at most
    replay_bytes: int  # on the host, when it is full of the longest responses

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.optimiser_bytes + self.logits_bytes + self.replay_bytes

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.trained_parameters:,} of them trained; about "
            f"{_size(self.total_bytes)}: networks {_size(self.weights_bytes)}, gradients and optimiser "
            f"{_size(self.optimiser_bytes)}, logits of a micro-batch up to {_size(self.logits_bytes)}, "
            f"the replay up to {_size(self.replay_bytes)}; "
            "activations and decoding caches come on top"
        )


def estimate_memory(recipe: Recipe) -> MemoryEstimate:
    """Count by arithmetic where the family is known, else build the model on the meta device from its config alone.

    Raises:
        UserError: the config of a hub model is not in the local cache (nothing is downloaded).
    """
    section = recipe.model
    size = size_of(section) or built_size(section, recipe.seed)
    trained = size.parameters if section.lora is None else section.lora.rank * size.lora_parameters
    bytes_each = BYTES[section.dtype]
    networks = 3 if recipe.qlearning.reference_reset_every is None else 4
    weights = networks * trained * bytes_each
    weights += size.parameters * bytes_each if section.lora is not None else 0
    if recipe.qlearning.target_dtype is not None:
        weights -= size.parameters * (bytes_each - BYTES[recipe.qlearning.target_dtype])
    optimisation = recipe.optimisation
    logits = optimisation.micro_batch_tokens * size.vocabulary * 4
    if optimisation.vocabulary_chunk_mib is not None:
        logits = min(logits, int(optimisation.vocabulary_chunk_mib * 2**20))
    optimiser = trained * (bytes_each + ADAM_BYTES)
    return MemoryEstimate(size.parameters, trained, weights, optimiser, logits * LOGITS_COPIES, replay_bytes(recipe))


def built_size(section: ModelSection, seed: int) -> Size:
    """By building the model on the meta device: slower, and for any family; raises as `estimate_memory`."""
    import torch  # here, as it takes seconds that no known family needs

    from lmdqn.model.loading import add_lora, build, read_config, scratch_config, train_tokenizer

    if section.from_scratch is not None:
        tokenizer = train_tokenizer([], section.from_scratch.vocabulary_size)
        config = scratch_config(section.from_scratch, tokenizer)
        config.vocab_size = section.from_scratch.vocabulary_size
    else:
        config = read_config(section, local_files_only=True)
    with torch.device("meta"):
        model: Any = build(config, seed)
        size = Size(config.get_text_config().vocab_size, sum(p.numel() for p in model.parameters()))
        if section.lora is not None:
            model = add_lora(model, section.lora, seed)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            size.lora_parameters = trained // section.lora.rank
    return size


def replay_bytes(recipe: Recipe) -> int:
    """Of a replay full of the longest responses there may be, the newest rollout not packed yet."""
    longest = recipe.max_response_tokens
    tokens = recipe.replay.capacity_episodes * longest
    if recipe.replay.capacity_tokens is not None:
        tokens = min(tokens, recipe.replay.capacity_tokens)
    rollout = recipe.rollout.prompts * (recipe.rollout.samples + recipe.replay.demonstrations)
    measured = 3 if recipe.qlearning.reference_reset_every is not None else 2  # log-probabilities, float32
    packed = tokens * (TOKEN_BYTES + 4 * measured) + math.ceil(tokens / longest) * EPISODE_BYTES
    return packed + rollout * (longest * (OPEN_TOKEN_BYTES + 4 * measured) + OPEN_EPISODE_BYTES)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.0f} MiB"
