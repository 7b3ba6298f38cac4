"""Numbers over the vocabulary, always in float32: bf16's spacing at logits of 16 to 128 is .1 to .5."""

import torch
from torch import Tensor


def log_prob_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log pi(token | state) in nats. logits (N, V), tokens (N,) -> (N,)."""
    logits = logits.float()
    return value_of(logits, tokens) - torch.logsumexp(logits, dim=-1)


def value_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logit of each state's token. logits (N, V), tokens (N,) -> (N,)."""
    return logits.float().gather(-1, tokens[:, None]).squeeze(-1)
