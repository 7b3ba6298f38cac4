"""Which training prompts a rollout draws: pure functions of the prompts' lengths."""

import torch
from torch import Tensor

LENGTH_BINS = 10
MOST_OFTEN = 8.0  # a prompt of a rare length is drawn at most so many times as often as the average one


def walk(lengths: Tensor, draw: str, generator: torch.Generator) -> Tensor:
    """Prompts' numbers in the order they are drawn, as many as there are prompts. lengths (E,) tokens -> (E,)."""
    if draw == "uniform":
        return torch.randperm(len(lengths), generator=generator)
    return torch.multinomial(length_weights(lengths), len(lengths), replacement=True, generator=generator)


def length_weights(lengths: Tensor) -> Tensor:
    """Weight of each prompt when every length is to be as frequent as any other.

    The span of lengths is cut into ten bins of equal width, and a prompt weighs one over the prompts in its bin, at
    most eight times the mean weight. Where training prompts are mostly short and those in use are long, uniform
    draws hardly ever practise what matters. lengths (E,) tokens -> (E,).
    """
    span = (lengths.max() - lengths.min()).clamp(min=1)
    bins = ((lengths - lengths.min()) * LENGTH_BINS // (span + 1)).long()
    weights = 1 / torch.bincount(bins, minlength=LENGTH_BINS)[bins].double()
    return weights.clamp(max=float(MOST_OFTEN * weights.mean()))
