"""Weights in shards over processes: cut up by torch's FSDP2, made whole for a while, gathered for a file.

A sharded network rests in shards: each process holds its part of every weight (a DTensor), of its gradient and of
Adam's moments. A pass gathers a layer when it is due. What all processes do together, as often as each other, may
pass through it as it rests; what each does at its own pace (decoding, measuring its episodes) needs it `whole`.
The functions below know the shards of DeepSpeed's ZeRO-3 too, which `zero` makes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Sharding:
    """How processes share networks out: by FSDP2, or by a stage of DeepSpeed's ZeRO."""

    zero_stage: int | None = None
    reshard_after_forward: bool = True  # FSDP2: a layer rests again between its forward and its backward pass

    def __str__(self) -> str:
        return "FSDP2" if self.zero_stage is None else f"DeepSpeed ZeRO-{self.zero_stage}"


class Shards:
    """A network whose weights lie in shards over all processes."""

    def __init__(self, network: nn.Module, layers: set[str], device: torch.device, reshard_after_forward: bool):
        """Cut up the network: each module whose class is in `layers` apart, and the rest.

        With `reshard_after_forward`, a layer rests again between its forward and its backward pass.
        """
        warnings.filterwarnings("ignore", ".*returned a view tensor")  # nothing is done in place on logits
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        found: list[nn.Module] = [module for module in network.modules() if type(module).__name__ in layers]
        for module in (*found, network):
            fully_shard(module, mesh=mesh, reshard_after_forward=reshard_after_forward and module is not network)
        self._layers: list[Any] = found  # FSDPModule, whose methods the type checker does not see in nn.Module
        self._units: list[Any] = [*found, network]
        self._reshard_after_forward = reshard_after_forward

    def rest(self) -> None:
        """Every weight goes back to its shards: what is read or written from here on are those."""
        for unit in self._units:
            unit.reshard()

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """Inside, the network with all its weights, whose passes wait for nobody. All processes must enter it."""
        for unit in self._units:
            unit.unshard()
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield self._units[-1]
        finally:
            for layer in self._layers:
                layer.set_reshard_after_forward(self._reshard_after_forward, recurse=False)
            self.rest()


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Weights and lasting buffers of a model that is whole; its own `state_dict` would give the shards."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        for buffer_name, buffer in module.named_buffers(prefix=name, recurse=False):
            if buffer_name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[buffer_name] = buffer
    return found


def own_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight and may change in place: ZeRO-3 keeps it beside an empty parameter."""
    return getattr(weight, "ds_tensor", weight)


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a tensor, cut as `like` is; the tensor itself where that is no shard."""
    if hasattr(full, "ds_tensor") or isinstance(full, DTensor):
        return own_part(full)
    if isinstance(like, DTensor):
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    if hasattr(like, "ds_tensor"):  # end to end, in equal parts, the last filled up with zeros
        length = like.ds_tensor.numel()
        part = full.flatten()[torch.distributed.get_rank() * length :][:length]
        return nn.functional.pad(part, (0, length - part.numel()))
    return full


def gathered(tree: Any) -> Any:
    """The tree with every sharded tensor whole, on the CPU of the first process; all processes must call it.

    The others get empty tensors, as the machine's memory may not hold the whole once for each process.
    """
    if isinstance(tree, DTensor):
        return _on_first_process(tree.full_tensor())
    if hasattr(tree, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tree]):
            return _on_first_process(tree.data.clone())
    if isinstance(tree, dict):
        return {key: gathered(part) for key, part in tree.items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], (Tensor, dict, list)):
        return [gathered(part) for part in tree]
    return tree


def _on_first_process(full: Tensor) -> Tensor:
    return full.detach().cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0)
