"""From logits to numbers, state by state, in float32: bf16's spacing at logits of 16 to 128 is .1 to .5.

`reduce_in_chunks` never holds the logits of more states than it is told to; the pure functions below it are what it
is given to reduce with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmdqn.model.compiling import compiled

Reduce = Callable[..., Any]  # (logits, ..., *per_state) -> a tensor, or a tuple of tensors, with a row a state
LogitsOf = Callable[[slice], Tensor]  # the (n, V) logits of some of the states


def reduce_in_chunks(
    reduce: Reduce,
    logits_of: Sequence[LogitsOf],
    per_state: Sequence[Tensor],
    states: int,
    at_once: int,
    is_compiled: bool = False,
) -> Any:
    """`reduce` over all states, `at_once` of them at a time; gradients make the logits of a chunk a second time.

    `reduce` takes one (n, V) float32 tensor for each of `logits_of`, then the same n states of each of `per_state`.
    """
    reduced = _compiled_reduced() if is_compiled else _reduced

    def reduce_chunk(chunk: slice) -> Any:
        return reduced(reduce, [of(chunk) for of in logits_of], [t[chunk] for t in per_state])

    if states <= at_once:
        return reduce_chunk(slice(0, states))
    chunks = [slice(start, start + at_once) for start in range(0, states, at_once)]
    if torch.is_grad_enabled():
        parts = [checkpoint(reduce_chunk, chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [reduce_chunk(chunk) for chunk in chunks]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    return torch.cat(parts)


def _reduced(reduce: Reduce, logits: Sequence[Tensor], per_state: Sequence[Tensor]) -> Any:
    return reduce(*(of_network.float() for of_network in logits), *per_state)


@cache
def _compiled_reduced() -> Callable[..., Any]:
    return compiled(_reduced)


Policy = Callable[[Tensor, Tensor | None], Tensor]  # logits and reference logits (N, V) -> log-probabilities (N, V)


def log_prob_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(token | state) in nats. logits (N, V), tokens (N,) -> (N,)."""
    return value_of(logits, tokens) - torch.logsumexp(logits, dim=-1)


def value_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logit of each state's token. logits (N, V), tokens (N,) -> (N,)."""
    return logits.gather(-1, tokens[:, None]).squeeze(-1)


def log_normaliser(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature * log sum_a exp(logit / temperature). (N, V) -> (N,)."""
    return temperature * torch.logsumexp(logits / temperature, dim=-1)


@dataclass(frozen=True)
class Scores:
    """What ranks the actions of a state: Q(s, .) up to an offset of the state and a unit.

    `relative` scores are log(pi / pi_0), which no offset of the logits changes; otherwise they are raw logits.
    Outside the reference's `top_k` they are -inf.
    """

    relative: bool
    top_k: int | None = None

    def __call__(self, logits: Tensor, reference: Tensor | None) -> Tensor:
        """logits (N, V), reference logits (N, V), needed if relative or with top_k -> (N, V)."""
        scores = logits
        if self.relative:
            assert reference is not None
            scores = logits.log_softmax(-1) - reference.log_softmax(-1)
        if self.top_k is not None:
            assert reference is not None
            weakest = reference.topk(min(self.top_k, reference.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(reference < weakest, -torch.inf)
        return scores


def greatest(logits: Tensor, reference: Tensor | None, scores: Scores) -> Tensor:
    """max_a of the scores. (N, V) -> (N,)."""
    return scores(logits, reference).amax(-1)


def score_of_best(logits: Tensor, chooser: Tensor, reference: Tensor | None, scores: Scores) -> Tensor:
    """The score of the action that another network's logits rank first. (N, V), (N, V) -> (N,)."""
    return value_of(scores(logits, reference), scores(chooser, reference).argmax(-1))


def is_best(logits: Tensor, reference: Tensor | None, tokens: Tensor, scores: Scores) -> Tensor:
    """1 where the state's token has the greatest score, else 0. logits (N, V), tokens (N,) -> (N,)."""
    ranked = scores(logits, reference)
    return (value_of(ranked, tokens) >= ranked.amax(-1)).float()


def expected_score(
    logits: Tensor, actor: Tensor, reference: Tensor | None, scores: Scores, behaviour: Policy
) -> Tensor:
    """The mean score under the behaviour policy of another network's logits. (N, V), (N, V) -> (N,)."""
    probabilities = behaviour(actor, reference).exp()
    return (probabilities * scores(logits, reference)).sum(-1)


def soft_expectation(logits: Tensor, actor: Tensor, temperature: float) -> Tensor:
    """E_a[logit - temperature log p(a)] under p = softmax(actor / temperature): log_normaliser less a KL.

    logits (N, V), actor (N, V) -> (N,).
    """
    log_p = (actor / temperature).log_softmax(-1)
    return (log_p.exp() * (logits - temperature * log_p)).sum(-1)


def negative_kl(logits: Tensor, actor: Tensor) -> Tensor:
    """-KL(softmax actor || softmax logits) in nats. (N, V), (N, V) -> (N,)."""
    log_p = actor.log_softmax(-1)
    return (log_p.exp() * (logits.log_softmax(-1) - log_p)).sum(-1)
