"""The processes that learn together, started by `accelerate launch`: who does which share, and what they exchange.

Every process has the same weights (or its shard of them) and the same counters. Each rolls out and scores its share of
a step's prompts, keeps its share of the replay, and learns from its share of each batch; gradients are summed. What is
random depends on seed, step and prompt, never on who does it, so the number of processes changes nothing but rounding.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lmdqn.errors import UserError

T = TypeVar("T")
THREADS_REST_S = 0.5
BUCKET_ELEMENTS = 2**24  # gradients are summed in buckets of about so many numbers


class Processes:
    """This process among all of them. One alone works as if this class were not there."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """The one that writes files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T], rank: int | None = None) -> list[T]:
        """The items that fall to a process, this one unless said."""
        return list(items[self.rank if rank is None else rank :: self.count])

    def holds(self, number: int) -> bool:
        """Whether this process keeps the group of that number."""
        return number % self.count == self.rank

    def together(self, work: Callable[[], T]) -> list[T]:
        """Every process does its work: what each of them gives, by rank.

        A UserError in one of them is raised in all of them, so that none waits for ever.
        """
        if self.count == 1:
            return [work()]
        value, problem = None, None
        try:
            value = work()
        except UserError as error:
            problem = error
        outcomes: list[tuple[T, UserError | None]] = [None] * self.count  # type: ignore[list-item]
        torch.distributed.all_gather_object(outcomes, (value, problem))
        for _, told in outcomes:
            if told is not None:
                raise told
        return [of_process for of_process, _ in outcomes]

    def gather(self, work: Callable[[], list[T]]) -> list[T]:
        """Every process works on its `share` and gives as many results: those of all, in the order of the whole."""
        shares = self.together(work)
        return [shares[i % self.count][i // self.count] for i in range(sum(map(len, shares)))]

    def on_main(self, work: Callable[[], T]) -> T:
        """The main process works, the others wait; all get the result."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def total(self, number: float) -> float:
        """The sum over all processes."""
        return sum(self.together(lambda: number))

    def of_main(self, number: float) -> float:
        """The main process's number, where clocks differ."""
        return self.together(lambda: number)[0]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the sum of all gradients. Any may have had no part in some of them."""
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[Tensor] = []
        for i, parameter in enumerate(parameters):
            assert parameter.grad is not None
            bucket.append(parameter.grad)
            following = parameters[i + 1] if i + 1 < len(parameters) else None
            full = sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS
            if following is None or full or following.dtype != parameter.dtype:
                self._sum(bucket)
                bucket = []

    def _sum(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def part() -> None:
    """Processes that have done all their work leave each other.

    A thread of gloo's drops its tensors a moment after the call that it served has returned, and aborts the process if
    the interpreter is going by then. Under FSDP2 these threads outlive the destroyed group: they get their moment.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        time.sleep(THREADS_REST_S)


def deal(numbers: Sequence[int], processes: int) -> list[list[int]]:
    """Who learns from which group: all as many, to within one, and where that goes those that a process holds."""
    most = -(-len(numbers) // processes)
    hands: list[list[int]] = [[] for _ in range(processes)]
    moving: list[int] = []
    for number in numbers:
        hand = hands[number % processes]
        (hand if len(hand) < most else moving).append(number)
    for number in moving:
        min(hands, key=len).append(number)
    return hands


@contextmanager
def others_alive() -> Iterator[None]:
    """What processes do together fails at once when one of them has died: tell so.

    Raises:
        UserError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"another process of this run has ended ({first}); go on from the last checkpoint with --resume"
        ) from error
