"""Peak learning rates by the width of a model, and their course over a run."""

import math

from lmdqn.model.loading import hidden_size
from lmdqn.model.qnetwork import QNetwork

MEASURED_WIDTH = 160  # hidden size of the models that rates were measured with
ALL_WEIGHTS_RATE = 3e-4  # measured best where all weights of such a model learn
ADAPTER_FACTOR = 10  # of an adapter's rate over that
WIDTH_POWER = 0.781  # by which a wider model's is less: Schulman et al.'s for Llama


def default_rate(network: QNetwork) -> float:
    """Peak rate for what of the network's language model learns.

    Rule and factor are those of Schulman et al. 2025 (LoRA Without Regret); the rate was measured here, and is within a
    fifth of theirs.
    """
    factor = ADAPTER_FACTOR if network.adapter is not None else 1
    return factor * ALL_WEIGHTS_RATE * (MEASURED_WIDTH / hidden_size(network.model)) ** WIDTH_POWER


def value_head_rate(network: QNetwork, of_measured: float) -> float:
    """Peak rate for the network's value head, from that for one of `MEASURED_WIDTH`.

    A step of Adam moves what a layer gives by the rate times its inputs (muP; Yang et al. 2021, table 3).
    """
    return of_measured * MEASURED_WIDTH / network.value_head.width


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
