"""Which training examples come next: an endless walk over each task's, and how often each task has its turn."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmdqn.episodes import Example

LENGTH_BINS = 10
MOST_OFTEN = 8.0  # a prompt of a rare length is drawn at most so many times as often as the average one


class ExampleWalk:
    """Gives examples by number, for ever; of several tasks, in proportion to their weights.

    Within a task the walk goes over its examples in shuffled order, or draws them by their lengths, and begins again
    when it is through. Tasks take turns without chance: the next one is that which is furthest behind its share.
    """

    def __init__(
        self, examples: Sequence[Example], weights: Mapping[str, float], draw: str, generator: torch.Generator
    ):
        """`weights` by task; `draw` as in `walk`."""
        self._draw = draw
        self._generator = generator
        self._weights = weights
        self._members = {task: [i for i, e in enumerate(examples) if e.task == task] for task in weights}
        self._lengths = torch.tensor([len(example.prompt_ids) for example in examples])  # (E,) tokens
        self._orders: dict[str, list[int]] = {task: [] for task in weights}
        self._behind = dict.fromkeys(weights, 0.0)  # of each task's share, in examples times the total weight

    def next(self, count: int) -> list[int]:
        """The next examples' numbers."""
        return [self._next_of(self._next_task()) for _ in range(count)]

    def state(self) -> dict[str, Any]:
        """Where it stands, for a checkpoint; the generator is not in it."""
        orders = {task: torch.tensor(order, dtype=torch.int64) for task, order in self._orders.items()}
        return {"orders": orders, "behind": dict(self._behind)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state()` gave."""
        self._orders = {task: order.tolist() for task, order in state["orders"].items()}
        self._behind = dict(state["behind"])

    def _next_task(self) -> str:
        for task, weight in self._weights.items():
            self._behind[task] += weight
        chosen = max(self._behind, key=self._behind.__getitem__)
        self._behind[chosen] -= sum(self._weights.values())
        return chosen

    def _next_of(self, task: str) -> int:
        if not self._orders[task]:
            members = self._members[task]
            places = walk(self._lengths[members], self._draw, self._generator)
            self._orders[task] = [members[place] for place in places.tolist()]
        return self._orders[task].pop(0)


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
