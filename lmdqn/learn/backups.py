"""What a state is worth to the token before it: V(s) by each backup, a plain dict from name to function.

Every form of Q reads Q(s, a) = base(s) + unit * score(s, a): dueling, the value head plus beta log(pi/pi_0);
calibrated, beta (LSE f - LSE f_0) plus the same, which is beta (f - f_0); classic, the raw logit f.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lmdqn.model.exploration import Exploration
from lmdqn.model.qnetwork import StateOutputs, over_vocabulary
from lmdqn.model.vocabulary import (
    Reduce,
    Scores,
    expected_score,
    greatest,
    is_best,
    log_normaliser,
    negative_kl,
    score_of_best,
    soft_expectation,
)
from lmdqn.recipe import QLearningSection


@dataclass
class Views:
    """What the networks say about the N states of one batch, and how the recipe reads Q from it."""

    recipe: QLearningSection
    exploration: Exploration
    online: StateOutputs
    target: StateOutputs
    reference: StateOutputs | None  # only where `needs_reference` says so
    value_scale: Tensor  # () the spread of returns, reward units: what the value head's errors are counted in

    @property
    def is_classic(self) -> bool:
        return self.recipe.form == "classic"

    @property
    def unit(self) -> float:
        """Reward units in one score."""
        return 1.0 if self.is_classic else self.recipe.beta

    @property
    def scores(self) -> Scores:
        return Scores(relative=not self.is_classic, top_k=self.recipe.backup_top_k)

    def over_vocabulary(self, outputs: Sequence[StateOutputs], reduce: Reduce, *per_state: Tensor) -> Tensor:
        """`reduce(logits, ..., reference logits or None, *per_state)` in each state: (N,)."""
        if self.reference is not None:
            return over_vocabulary([*outputs, self.reference], reduce, *per_state)
        count = len(outputs)
        return over_vocabulary(outputs, lambda *args: reduce(*args[:count], None, *args[count:]), *per_state)

    def base(self, outputs: StateOutputs) -> Tensor:
        """(N,) reward units: what all actions of a state have in common."""
        if self.recipe.has_value_head:
            return outputs.values
        if self.is_classic:
            return torch.zeros_like(outputs.values)
        assert self.reference is not None
        reference = self.reference.over_vocabulary(log_normaliser)
        return self.recipe.beta * (outputs.over_vocabulary(log_normaliser) - reference)

    def soft_value(self, outputs: StateOutputs) -> Tensor:
        """(N,) beta log sum_a pi_0 exp(Q / beta), which is the base; classic: against the uniform policy."""
        if self.is_classic:
            return outputs.over_vocabulary(partial(log_normaliser, temperature=self.recipe.beta))
        return self.base(outputs)


def needs_reference(recipe: QLearningSection, exploration: Exploration) -> bool:
    """Whether an update must run the reference network: the dueling soft backup never needs more than is stored."""
    if recipe.form == "calibrated" or recipe.backup_top_k is not None:
        return True
    if recipe.backup == "expected" and exploration.needs_reference:
        return True
    return recipe.has_value_head and not recipe.is_soft


def needs_target_logits(recipe: QLearningSection) -> bool:
    """Whether the target's logits are asked for: the dueling soft backup takes its value head alone."""
    return not (recipe.has_value_head and recipe.backup == "soft")


def soft(views: Views) -> Tensor:
    """Vbar(s) = beta log sum_a pi_0 exp(Qbar / beta) (Haarnoja et al. 2017; relative to pi_0)."""
    return views.soft_value(views.target)


def soft_double(views: Views) -> Tensor:
    """Vbar(s) - beta KL(pi_theta || pibar), which is E_{pi_theta}[Qbar - beta log(pi_theta/pi_0)]: soft Double DQN."""
    if views.is_classic:
        expectation = partial(soft_expectation, temperature=views.recipe.beta)
        return over_vocabulary([views.target, views.online], expectation)
    return views.base(views.target) + views.unit * over_vocabulary([views.target, views.online], negative_kl)


def hard(views: Views) -> Tensor:
    """max_a Qbar(s, a), among the reference's top-k where asked (Mnih et al. 2015)."""
    best = views.over_vocabulary([views.target], partial(greatest, scores=views.scores))
    return views.base(views.target) + views.unit * best


def double(views: Views) -> Tensor:
    """Qbar(s, argmax_a Q_theta(s, a)) (Double DQN, van Hasselt et al. 2016)."""
    chosen = partial(score_of_best, scores=views.scores)
    best = views.over_vocabulary([views.target, views.online], chosen)
    return views.base(views.target) + views.unit * best


def expected(views: Views) -> Tensor:
    """E_mu[Qbar(s, .)] under the behaviour policy mu of the online network (Expected Sarsa, van Seijen et al. 2009)."""
    mean = partial(expected_score, scores=views.scores, behaviour=views.exploration.log_probs)
    return views.base(views.target) + views.unit * views.over_vocabulary([views.target, views.online], mean)


BACKUPS: dict[str, Callable[[Views], Tensor]] = {
    "soft": soft,
    "soft_double": soft_double,
    "hard": hard,
    "double": double,
    "expected": expected,
}


def is_greedy(views: Views, tokens: Tensor) -> Tensor:
    """(N,) 1 where the token is the one that the hard backups take: past any other, Watkins' return is cut."""
    chooser = views.online if views.recipe.backup == "double" else views.target
    return views.over_vocabulary([chooser], partial(is_best, scores=views.scores), tokens)
