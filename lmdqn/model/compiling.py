"""torch.compile for passes over whole responses: the stacks of layers and what is read from logits, never rollouts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lmdqn.errors import UserError

GRAPHS = 64  # of one function: transformers wraps all its models in the same few, and adapters and gradients tell apart

Forward = Callable[..., Any]


def compiled(function: Forward) -> Forward:
    """The function by torch.compile, for tensors of any shape: made when first called, and again for other kinds."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)


def compiled_layers(model: Any) -> list[tuple[nn.Module, Forward]]:
    """The decoder, and where there is one the encoder, each with its compiled `forward`; the model stays as it is.

    Raises:
        UserError: the LM head is among the layers, where hooks are put on it.
    """
    stacks = [model.get_decoder()]
    if model.config.is_encoder_decoder:
        stacks.append(model.get_encoder())
    if any(module is model.get_output_embeddings() for stack in stacks for module in stack.modules()):
        raise UserError(
            f"the layers of this {model.config.model_type} model cannot be compiled apart from its LM head: "
            "set optimisation.torch_compile=false"
        )
    return [(stack, compiled(stack.forward)) for stack in stacks]


def check_compiler(device: torch.device) -> None:
    """Compile something small.

    Raises:
        UserError: torch.compile does not work here.
    """
    try:
        compiled(torch.sin)(torch.zeros(2, device=device))
    except RuntimeError as error:  # of dynamo, or of a compiler that is missing
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"optimisation.torch_compile=true needs a compiler that works here (CPU: g++, GPU: Triton): {reason}"
        ) from error
