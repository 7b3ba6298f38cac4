"""Layers that keep their inputs alone for the backward pass, and work again there (Chen et al. 2016)."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lmdqn.errors import UserError
from lmdqn.model.compiling import Forward


def checkpointed_layers(model: Any) -> list[tuple[nn.Module, Forward]]:
    """Every layer, each with a `forward` that is checkpointed; the model stays as it is.

    transformers' own way would need the model in training mode, and so with dropout.

    Raises:
        UserError: the family's layers are not known to bear it.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"the layers of this {model.config.model_type} model cannot be checkpointed: "
            "set optimisation.gradient_checkpointing=false"
        )
    return [(layer, partial(checkpoint, layer.forward, use_reentrant=False)) for layer in layers]
