"""What `accelerate launch` asked for beside data parallelism: FSDP2 or DeepSpeed ZeRO, or something that is refused."""

import os
from importlib.util import find_spec

from accelerate.utils import FullyShardedDataParallelPlugin

from lmdqn.errors import UserError
from lmdqn.model.sharding import Sharding
from lmdqn.recipe import Recipe

NOT_THERE = {
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "zero3_init_flag",
}
NONE_OF = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",  # optimisation.clip_norm says it
}


def sharding_of_launch(recipe: Recipe) -> Sharding | None:
    """How the launcher wants networks shared out, None where each process keeps them whole. Nothing is started.

    Raises:
        UserError: the launcher, or the recipe with it, wants what this does not do.
    """
    if _is_on("ACCELERATE_USE_MEGATRON_LM"):
        raise UserError("Megatron-LM is not supported: use recipes/accelerate/fsdp2.yaml or zero3.yaml")
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise UserError("leave gradient_accumulation_steps at 1: optimisation.micro_batch_tokens accumulates gradients")
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        sharding = _zero()
    elif _is_on("ACCELERATE_USE_FSDP"):
        sharding = _fsdp2()
    else:
        return None
    for variable, key in NOT_THERE.items():
        if _is_on(variable):
            raise UserError(f"{key} is not supported: turn it off in the accelerate config")
    if recipe.model.lora is not None:
        raise UserError(
            f"{sharding} with model.lora is not supported: use recipes/accelerate/one_node.yaml, or all weights"
        )
    for key in ("torch_compile", "gradient_checkpointing"):
        if getattr(recipe.optimisation, key):
            raise UserError(f"{sharding} with optimisation.{key} is not supported: set it to false")
    precision = recipe.optimisation.mixed_precision
    if precision == "fp16" or (precision != "no" and sharding.zero_stage is not None):
        instead = "bf16 or no" if sharding.zero_stage is None else "no, or FSDP2"
        raise UserError(f"{sharding} with optimisation.mixed_precision={precision} is not supported: use {instead}")
    return sharding if sharding.zero_stage is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _fsdp2() -> Sharding:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("only FSDP2 is supported: set fsdp_version: 2 in the accelerate config")
    return Sharding(reshard_after_forward=FullyShardedDataParallelPlugin().reshard_after_forward)


def _zero() -> Sharding:
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    if stage not in ("2", "3"):
        raise UserError("set deepspeed_config.zero_stage to 2 or 3 in the accelerate config, as zero2.yaml does")
    for variable, key in NONE_OF.items():
        if os.environ.get(variable, "none") != "none":
            raise UserError(f"{key} is not supported: set it to none in the accelerate config")
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed: pip install 'lmdqn[deepspeed]'")
    return Sharding(zero_stage=int(stage))


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on")
