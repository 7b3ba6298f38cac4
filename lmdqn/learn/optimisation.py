"""One update: micro-batches, gradients through Accelerate, clipping, a step of AdamW."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lmdqn.errors import NotFinite
from lmdqn.learn.processes import Processes
from lmdqn.model.qnetwork import QNetwork
from lmdqn.model.sharding import part_of
from lmdqn.model.zero import Zero

Part = TypeVar("Part")
ParameterGroup = tuple[list[nn.Parameter], float]  # parameters and their peak learning rate


class Skips:
    """Counts what was skipped because a number was not finite."""

    def __init__(self, most_in_a_row: int):
        self.most_in_a_row = most_in_a_row
        self.total = 0
        self.in_a_row = 0

    def note(self, problem: NotFinite) -> None:
        """One more; raises `problem` when it is one too many in a row."""
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row > self.most_in_a_row:
            raise problem

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


class Optimiser:
    """AdamW with clipping; gradients of all micro-batches of an update add up to the gradient of the whole batch."""

    def __init__(
        self,
        accelerator: Accelerator,
        groups: list[ParameterGroup],
        betas: tuple[float, float],
        weight_decay: float,
        clip_norm: float,
        network: QNetwork | None = None,
    ):
        """Of a network that DeepSpeed shares out, the step is DeepSpeed's."""
        self.accelerator = accelerator
        self.processes = Processes(accelerator)
        self.clip_norm = clip_norm
        self._rates = [rate for _, rate in groups]
        self._parameters = [p for parameters, _ in groups for p in parameters]
        self._groups = [{"params": parameters, "lr": rate} for parameters, rate in groups]
        self._settings: dict[str, Any] = {"betas": betas, "weight_decay": weight_decay}
        self._zero = network.shards if network is not None and isinstance(network.shards, Zero) else None
        self._begin()

    def _begin(self) -> None:
        adamw = torch.optim.AdamW([dict(group) for group in self._groups], **self._settings)
        self._adamw = adamw if self._zero is not None else self.accelerator.prepare_optimizer(adamw)
        if self._zero is not None:
            self._zero.train(adamw, self.clip_norm)

    def update(
        self, parts: Sequence[Part], loss_of: Callable[[Part], Tensor], rate_factor: float, idle: Part | None = None
    ) -> float:
        """Add up the gradients of `loss_of` each part and take one step; gives the gradient's norm before clipping.

        Each process brings its own parts; all take the same step. Where weights are sharded, all must make equally
        many passes: those with fewer parts pass `idle` without any effect.

        Raises:
            NotFinite: the gradient is not; no weight has moved.
        """
        self._add_gradients(parts, loss_of, idle)
        for group, rate in zip(self._adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        norm = self._step() if self._zero is None else self._zero.step()
        if not norm.isfinite():
            raise NotFinite("the gradient of the loss is not finite")
        return float(norm)

    def _add_gradients(self, parts: Sequence[Part], loss_of: Callable[[Part], Tensor], idle: Part | None) -> None:
        sharded = self._zero is not None or any(isinstance(parameter, DTensor) for parameter in self._parameters)
        passes = max(self.processes.together(lambda: len(parts))) if sharded else len(parts)
        for number in range(passes):
            with self.accelerator.autocast():
                loss = loss_of(parts[number]) if number < len(parts) else self._nothing(loss_of, idle)
            loss = loss * self.processes.count if sharded else loss  # FSDP2 and DeepSpeed take the mean
            if self._zero is not None:
                self._zero.backward(loss, number + 1 == passes)
            else:
                self.accelerator.backward(loss)
        if not sharded:
            self.processes.sum_gradients(self._parameters)

    def _step(self) -> Tensor:
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm.isfinite() or self.accelerator.scaler is not None:  # fp16's scaler skips by itself and scales down
            self._adamw.step()
        self._adamw.zero_grad()
        return norm

    @staticmethod
    def _nothing(loss_of: Callable[[Part], Tensor], idle: Part | None) -> Tensor:
        assert idle is not None
        return 0 * loss_of(idle)

    def state(self) -> dict[str, Any]:
        """Adam's moments of each parameter, and the loss scale of fp16."""
        if self._zero is not None:
            return {"moments": self._zero.moments(self._parameters), "scaler": None}
        moments = {str(i): moment for i, moment in self._adamw.state_dict()["state"].items()}
        scaler = self.accelerator.scaler
        return {"moments": moments, "scaler": scaler.state_dict() if scaler is not None else None}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave, when the network has gone on from its own."""
        if self._zero is not None:
            self._begin()
            self._zero.take_moments(state["moments"], self._parameters)
            return
        moments = {int(i): self._own(moment, self._parameters[int(i)]) for i, moment in state["moments"].items()}
        self._adamw.load_state_dict({**self._adamw.state_dict(), "state": moments})
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    @staticmethod
    def _own(moment: dict[str, Tensor], parameter: nn.Parameter) -> dict[str, Tensor]:
        """This process's part of what Adam keeps of a parameter; the count of its steps has no parts."""
        return {name: part_of(kept, parameter) if kept.dim() else kept for name, kept in moment.items()}
