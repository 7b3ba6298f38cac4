"""What `accelerate launch` asked for beside data parallelism: FSDP2, or something that is refused."""

import os
from typing import Any

from accelerate.utils import FullyShardedDataParallelPlugin

from lmdqn.errors import UserError
from lmdqn.recipe import Recipe

OTHERS = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
ZERO = (
    "recipes/accelerate/fsdp2.yaml shards weights, gradients and optimiser as ZeRO-3 does, and with "
    "fsdp_reshard_after_forward: false as ZeRO-2 does"
)


def sharding_of_launch(recipe: Recipe) -> Any:
    """Accelerate's FSDP settings where the launcher set them, else None. They are data; nothing is started.

    Raises:
        UserError: the launcher, or the recipe with it, wants what this does not do.
    """
    for variable, name in OTHERS.items():
        if _is_on(variable):
            raise UserError(f"{name} is not supported: {ZERO}")
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise UserError("leave gradient_accumulation_steps at 1: optimisation.micro_batch_tokens accumulates gradients")
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("only FSDP2 is supported: set fsdp_version: 2 in the accelerate config")
    for variable, key in (
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism_config"),
    ):
        if _is_on(variable):
            raise UserError(f"{key} is not supported: turn it off in the accelerate config")
    if recipe.model.lora is not None:
        raise UserError("FSDP2 with model.lora is not supported: use recipes/accelerate/one_node.yaml, or all weights")
    if recipe.optimisation.mixed_precision == "fp16":
        raise UserError("FSDP2 with optimisation.mixed_precision=fp16 is not supported: use bf16 or no")
    return FullyShardedDataParallelPlugin()


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")
