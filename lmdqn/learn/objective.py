"""From a batch and the networks to the loss: which Q, which target, which residual."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmdqn.episodes import Batch
from lmdqn.learn.backups import BACKUPS, Views, is_greedy, needs_reference, needs_target_logits
from lmdqn.learn.losses import path_residuals, quantile_loss, residual_loss
from lmdqn.learn.targets import (
    continuing,
    discounts,
    group_values,
    importance_weights,
    lambda_targets,
    n_step_targets,
)
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import StateOutputs, response_log_probs
from lmdqn.model.vocabulary import value_of
from lmdqn.recipe import QLearningSection


@dataclass
class Learnt:
    """A loss and what it was made of, for logging."""

    loss: Tensor  # () summed over the batch's residuals, in nats squared (classic: reward squared)
    residuals: Tensor  # (B, T) detached, or (B, 1) for a path loss
    log_ratios: Tensor  # (B, T) log(pi / pi_0) in nats, detached
    values: Tensor  # (B, T) V(s_t) of the online network, reward units, detached


def q_loss(batch: Batch, networks: Networks, recipe: QLearningSection, exploration: Exploration) -> Learnt:
    """The recipe's loss on one batch, differentiable in the online network alone.

    `exploration` is the behaviour policy of the moment: the expected backup takes its mean under it.
    """
    views = _look(batch, networks, recipe, exploration)
    log_probs = response_log_probs(batch, views.online)
    weights = _weights(batch, log_probs, recipe)
    log_ratios = (log_probs - batch.reference_log_probs) * batch.response_mask
    loss_of = _path_loss if recipe.loss == "path" else _td_loss
    learnt = loss_of(batch, views, log_probs, log_ratios, weights)
    terms = conservative_terms(batch, views, log_probs, log_ratios)
    if recipe.conservative:
        learnt.loss = learnt.loss + recipe.conservative * terms.sum()
    if recipe.supervised:
        learnt.loss = learnt.loss + recipe.supervised * terms[batch.demonstrations].sum()
    return learnt


def loss_terms(batch: Batch, recipe: QLearningSection) -> int:
    """How many residuals the batch's loss sums: tokens, or episodes."""
    return len(batch.response_mask) if recipe.loss == "path" else int(batch.response_mask.sum())


def conservative_terms(batch: Batch, views: Views, log_probs: Tensor, log_ratios: Tensor) -> Tensor:
    """log sum_a pi_0 exp(Q/beta) - Q(a_t)/beta of each token (Kumar et al. 2020, eq. 4, with pi_0 as prior), (B, T).

    With Q = V + beta log(pi/pi_0) this is -log(pi/pi_0)(a_t): the MLE loss on the data's actions up to a constant.
    The classic form takes it of raw logits: -log pi(a_t). On demonstrations alone it is the supervised loss of
    learning from demonstrations (DQfD, Hester et al. 2018, eq. 4), soft like everything here.
    """
    return -(log_probs if views.is_classic else log_ratios)


def _td_loss(batch: Batch, views: Views, log_probs: Tensor, log_ratios: Tensor, weights: Tensor) -> Learnt:
    """Q(s_t, a_t) of each token against its target; residuals in nats (classic: in reward).

    A value head, the base of Q, is a constant here and learns by a loss of its own.
    """
    recipe, unit = views.recipe, views.unit
    scores = batch.at_tokens(views.online.over_vocabulary(value_of, batch.actions)) if views.is_classic else log_ratios
    bases = batch.at_states(views.base(views.online))[:, :-1]  # (B, T)
    with torch.no_grad():
        y, returns = _targets(batch, views, scores)
        values = batch.at_states(BACKUPS[recipe.backup](replace(views, target=views.online)))
    residuals = ((bases.detach() if recipe.has_value_head else bases) - y) / unit + scores
    learnt = _learnt(residuals, weights, log_ratios, values, recipe)
    if recipe.has_value_head:
        learnt.loss = learnt.loss + _value_loss(batch, views, bases, returns, weights)
    if recipe.actor:
        advantages = -learnt.residuals if recipe.is_soft else (y - learnt.values) / unit
        learnt.loss = learnt.loss - recipe.actor * (weights * advantages * log_probs).sum()
    return learnt


def _value_loss(batch: Batch, views: Views, values: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Of the value head, () summed over tokens: V(s_t) against the return from s_t on, in units of its spread.

    values, returns, weights (B, T), of a path (B, 1). Whole returns owe nothing to what V says by now, so it is soon
    right enough for Q to bootstrap from it early (traces apart for policy and value: Yuan et al. 2025, in PPO).
    """
    if views.online.quantiles is None:
        return residual_loss((values - returns) / views.value_scale, weights, None)
    mask = batch.response_mask
    quantiles = views.online.quantiles[batch.acting] / views.value_scale
    return quantile_loss(quantiles, returns[mask] / views.value_scale, weights[mask])


def _targets(batch: Batch, views: Views, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) targets of Q(s_t, a_t) by the recipe's backup and return, and of V(s_t) by its backup and value_trace."""
    recipe = views.recipe
    values = batch.at_states(BACKUPS[recipe.backup](views))  # (B, T + 1)
    bonuses, greedy = torch.zeros_like(scores), None
    if recipe.is_soft:
        bonuses = views.unit * scores
        if views.is_classic:
            bonuses = bonuses - batch.at_tokens(views.soft_value(views.online))
    elif recipe.backup in ("hard", "double"):
        greedy = batch.at_tokens(is_greedy(views, batch.actions)).bool()
    continues = continuing(batch.response_mask, greedy)
    terms = batch.rewards, values, bonuses, continues, recipe.gamma
    of_q = lambda_targets(*terms, recipe.trace) if recipe.n_step is None else n_step_targets(*terms, recipe.n_step)
    return of_q, lambda_targets(*terms, recipe.trace_of_values) - views.unit * scores


def _path_loss(batch: Batch, views: Views, log_probs: Tensor, log_ratios: Tensor, weights: Tensor) -> Learnt:
    """One residual an episode; the prompt's value is the network's, or in closed form from its group."""
    recipe = views.recipe
    gammas = discounts(log_ratios.shape[1], recipe.gamma, log_ratios)
    lengths = batch.response_mask.sum(1, keepdim=True)  # (B, 1)
    if recipe.path_value == "network":
        values = batch.at_states(views.base(views.online))
        first_values = values[:, 0]
        with torch.no_grad():
            last = batch.at_states(views.base(views.target)).gather(1, lengths)  # zero unless truncated
        last_values = (recipe.gamma**lengths * last).squeeze(1)
    else:
        returns = (gammas * batch.rewards).sum(1) - recipe.beta * (gammas * log_ratios.detach()).sum(1)
        first_values = group_values(returns, batch.groups)
        last_values = torch.zeros_like(first_values)
        values = first_values[:, None].expand(-1, log_ratios.shape[1] + 1)
    learns_value = recipe.path_value == "network" and recipe.has_value_head
    constant = first_values.detach() if learns_value else first_values
    residuals = path_residuals(constant, last_values, log_ratios, batch.rewards, gammas, recipe.beta)[:, None]
    learnt = _learnt(residuals, weights[:, :1], log_ratios, values, recipe)
    if learns_value:
        left = constant[:, None] - recipe.beta * residuals.detach()  # (B, 1) what the path leaves for V(s_1)
        learnt.loss = learnt.loss + _value_loss(batch, views, first_values[:, None], left, weights[:, :1])
    return learnt


def _look(batch: Batch, networks: Networks, recipe: QLearningSection, exploration: Exploration) -> Views:
    """Run the networks that the recipe's form, backup and loss need."""
    online, scale = networks.online(batch), networks.online.value_head.scale
    if recipe.loss == "path" and recipe.path_value == "group":
        return Views(recipe, exploration, online, target=online, reference=None, value_scale=scale)  # V in closed form
    with torch.no_grad():
        target = networks.target(batch) if needs_target_logits(recipe) else _followed(batch, networks, online)
        reference = networks.reference(batch) if needs_reference(recipe, exploration) else None
    return Views(recipe, exploration, online, target, reference, scale)


def _followed(batch: Batch, networks: Networks, online: StateOutputs) -> StateOutputs:
    """What the target says where it is asked for values alone: its value head reads the online network's hidden states.

    No value depends on the trunk through a gradient, so the head is all that a target must hold still; a pass of the
    target's trunk would cost an eighth of a step.
    """
    return online._replace(values=networks.target.values_of(batch, online.hidden))


def _weights(batch: Batch, log_probs: Tensor, recipe: QLearningSection) -> Tensor:
    """(B, T) what each token's residual weighs, zero on padding."""
    weights = batch.weights[:, None] * batch.response_mask
    if recipe.supervised:
        weights = weights * ~batch.demonstrations[:, None]
    if recipe.importance == "none":
        return weights
    ratios = importance_weights(
        log_probs, batch.behaviour_log_probs, batch.response_mask, recipe.importance, recipe.importance_clip
    )
    return weights * ratios


def _learnt(residuals: Tensor, weights: Tensor, log_ratios: Tensor, values: Tensor, recipe: QLearningSection) -> Learnt:
    loss = residual_loss(residuals, weights, recipe.huber_delta)
    masked = residuals.masked_fill(weights == 0, 0.0)
    return Learnt(loss, masked.detach(), log_ratios.detach(), values[:, :-1].detach())
