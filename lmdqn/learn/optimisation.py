"""One update: micro-batches, gradients through Accelerate, clipping, and the course of the learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

Part = TypeVar("Part")
ParameterGroup = tuple[list[nn.Parameter], float]  # parameters and their peak learning rate


class Optimiser:
    """AdamW with clipping; gradients of all micro-batches of an update add up to the gradient of the whole batch."""

    def __init__(
        self,
        accelerator: Accelerator,
        groups: list[ParameterGroup],
        betas: tuple[float, float],
        weight_decay: float,
        clip_norm: float,
    ):
        self.accelerator = accelerator
        self.clip_norm = clip_norm
        self._rates = [rate for _, rate in groups]
        self._parameters = [p for parameters, _ in groups for p in parameters]
        adamw = torch.optim.AdamW(
            [{"params": parameters, "lr": rate} for parameters, rate in groups], betas=betas, weight_decay=weight_decay
        )
        self._adamw = accelerator.prepare_optimizer(adamw)

    def update(self, parts: Iterable[Part], loss_of: Callable[[Part], Tensor], rate_factor: float) -> float:
        """Add up the gradients of `loss_of` each part and take one step; gives the gradient's norm before clipping."""
        for part in parts:
            with self.accelerator.autocast():
                loss = loss_of(part)
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self._parameters, self.clip_norm)
        for group, rate in zip(self._adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * rate_factor
        self._adamw.step()
        self._adamw.zero_grad()
        return float(norm)


def rate_factor(schedule: str, progress: float, warmup: float) -> float:
    """Learning rate over its peak when `progress` of the budget (0 to 1) is spent; it rises linearly until `warmup`."""
    if progress < warmup:
        return progress / warmup
    left = 1 - (progress - warmup) / max(1e-9, 1 - warmup)
    left = min(1.0, max(0.0, left))
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return 1.0
