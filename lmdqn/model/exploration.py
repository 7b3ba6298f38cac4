"""The behaviour policy: how tokens are chosen in a rollout, and its course over the steps."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lmdqn.recipe import RolloutSection


@dataclass(frozen=True)
class Exploration:
    """Boltzmann at `temperature`, or epsilon-greedy when `epsilon` is given, among the tokens that are allowed.

    `top_k` is of the policy itself; `reference_top_k` and `reference_top_p` keep the choice where the frozen
    reference finds it likely. `sharpness` c mixes the two: pi_b ~ pi_0^(1 - c) pi^c, which is pi_0 exp(b Q) with
    b = c / beta.
    """

    temperature: float = 1.0
    top_k: int | None = None
    epsilon: float | None = None
    reference_top_k: int | None = None
    reference_top_p: float | None = None
    sharpness: float | None = None

    @property
    def needs_reference(self) -> bool:
        return any(x is not None for x in (self.reference_top_k, self.reference_top_p, self.sharpness))

    def log_probs(self, logits: Tensor, reference: Tensor | None = None) -> Tensor:
        """The behaviour policy. logits (B, V), reference logits (B, V) -> (B, V) log-probabilities in nats."""
        logits = logits.float()
        if self.sharpness is not None:
            assert reference is not None
            logits = torch.lerp(reference.float().log_softmax(-1), logits.log_softmax(-1), self.sharpness)
        logits = logits / self.temperature
        if self.reference_top_k is not None or self.reference_top_p is not None:
            assert reference is not None
            logits = logits.masked_fill(~self._likely(reference.float()), -torch.inf)
        if self.top_k is not None:
            logits = _top_k(logits, self.top_k)
        if self.epsilon is None:
            return logits.log_softmax(-1)
        allowed = logits.isfinite()
        uniform = allowed / allowed.sum(-1, keepdim=True)
        greedy = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return (self.epsilon * uniform + (1 - self.epsilon) * greedy).log()

    def _likely(self, reference: Tensor) -> Tensor:
        """(B, V) True on the reference's k likeliest tokens, and on the fewest whose probability reaches top_p."""
        if self.reference_top_k is not None:
            reference = _top_k(reference, self.reference_top_k)
        likely = reference.isfinite()
        if self.reference_top_p is not None:
            ordered, order = reference.softmax(-1).sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of all that is likelier
            likely &= torch.zeros_like(likely).scatter_(-1, order, before < self.reference_top_p)
        return likely


def exploration_at(rollout: RolloutSection, step: int) -> Exploration:
    """How the rollout of a step (counted from 0) explores."""
    epsilon = None
    if rollout.epsilon_greedy:
        if rollout.epsilon_decay == "linear":
            decayed = min(1.0, step / rollout.epsilon_decay_steps)
        else:
            decayed = 1.0 - math.exp(-step / rollout.epsilon_decay_steps)
        epsilon = rollout.epsilon_start + decayed * (rollout.epsilon_end - rollout.epsilon_start)
    return Exploration(rollout.temperature, rollout.top_k, epsilon, rollout.reference_top_k, rollout.reference_top_p)


def _top_k(logits: Tensor, k: int) -> Tensor:
    weakest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < weakest, -torch.inf)
