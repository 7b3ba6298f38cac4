"""Weights, gradients and Adam's moments in shards by DeepSpeed: ZeRO-2 (weights stay whole) and ZeRO-3.

All that knows DeepSpeed stands here and in `sharding`. Its engine takes over an AdamW: it sums gradients, clips, steps,
and skips a step whose gradient is not finite. Weights and moments are read and written by DeepSpeed's own functions.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmdqn.model.sharding import part_of

MOMENTS = ("exp_avg", "exp_avg_sq")
LEARNT = {2: "single_partition_of_fp32_groups", 3: "fp32_partitioned_groups_flat"}  # what AdamW sees of the weights
Moments = dict[str, dict[str, Tensor]]  # by the number of a parameter, as AdamW names them


class Zero:
    """A network in DeepSpeed's care."""

    def __init__(self, network: nn.Module, stage: int):
        """Cut up the network's weights (ZeRO-3), or leave them whole until it is trained (ZeRO-2)."""
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._network = network
        self._stage = stage
        self._engine: Any = None
        self._adamw: torch.optim.AdamW | None = None
        if stage == 3:
            self._hollow = _hollow(network)
            self._start()

    def rest(self) -> None:
        """Every weight goes back to its shards: what is read or written from here on are those."""
        if self._stage == 3:
            for weight in self._network.parameters():
                weight.partition()  # type: ignore[attr-defined]

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """Inside, a network with all weights, whose passes wait for nobody. All processes must enter it."""
        if self._stage != 3:
            yield self._network
            return
        import deepspeed

        mine, hollow = list(self._network.parameters()), list(self._hollow.parameters())
        with deepspeed.zero.GatheredParameters(mine):
            for empty, weight in zip(hollow, mine, strict=True):
                empty.data = weight.data
            try:
                yield self._hollow
            finally:
                for empty in hollow:
                    empty.data = empty.new_empty(0)

    def train(self, adamw: torch.optim.AdamW, clip_norm: float) -> None:
        """From here on steps are AdamW's, from the weights as they are now, in the place of one before."""
        self._adamw = adamw
        self._start(optimizer=adamw, gradient_clipping=clip_norm)
        optimiser = self._engine.optimizer
        for flat in getattr(
            optimiser, LEARNT[self._stage]
        ):  # AdamW makes its moments in its first step, too late for `take_moments`
            adamw.state[flat] = {"step": torch.zeros(()), **{name: torch.zeros_like(flat) for name in MOMENTS}}
        if self._stage == 2:
            optimiser._lazy_init_hp_params_optimizer_state()

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Add up gradients; all processes make equally many passes, of which the last is told."""
        self._engine.optimizer.clear_backward_seen_flag()  # as the engine's forward would: micro-batches add up
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)

    def step(self) -> Tensor:
        """Move the weights by the mean of the processes' gradients; gives its norm before clipping.

        Where that is not finite, no weight moves.
        """
        self._engine.step()
        return torch.as_tensor(float("nan") if self._engine.optimizer.overflow else self._engine.get_global_grad_norm())

    def moments(self, parameters: Sequence[nn.Parameter]) -> Moments:
        """What AdamW keeps of each parameter, whole, on the first process; all must ask."""
        from deepspeed.utils import safe_get_full_optimizer_state

        assert self._adamw is not None
        steps = next(iter(self._adamw.state.values()))["step"]
        found: Moments = {}
        for i, parameter in enumerate(parameters):
            kept = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            is_main = torch.distributed.get_rank() == 0
            found[str(i)] = {"step": steps.clone()} | {n: t.cpu() if is_main else t[:0] for n, t in kept.items()}
        return found

    def take_moments(self, moments: Mapping[str, Mapping[str, Tensor]], parameters: Sequence[nn.Parameter]) -> None:
        """Go on from what `moments()` gave."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not moments:  # of a run that has not begun
            return
        assert self._adamw is not None
        for i, parameter in enumerate(parameters):
            for name in MOMENTS:
                moment = moments[str(i)][name].to(parameter.device)
                if self._stage == 3:
                    safe_set_local_optimizer_state(parameter, part_of(moment, parameter), name)
                else:
                    safe_set_full_optimizer_state(parameter, moment, name)
        for state in self._adamw.state.values():
            state["step"].copy_(moments["0"]["step"])

    def _start(self, optimizer: torch.optim.AdamW | None = None, **settings: float) -> None:
        import deepspeed

        if self._engine is not None:
            self._engine.destroy()
        config = {
            "train_micro_batch_size_per_gpu": 1,  # asked for; nothing here depends on it
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": self._stage, "stage3_param_persistence_threshold": 0},
            **settings,
        }
        self._engine = deepspeed.initialize(model=self._network, optimizer=optimizer, config=config)[0]


def _hollow(network: nn.Module) -> Any:
    """A copy without weights, of which it has empty ones, and with the same buffers."""
    empty = {id(p): nn.Parameter(p.new_empty(0), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, empty | {id(b): b for b in network.buffers()}).eval()
