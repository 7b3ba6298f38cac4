"""From a batch and the networks to the loss: which Q, which target, which residual."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lmdqn.episodes import Batch
from lmdqn.learn.losses import path_residuals, residual_loss
from lmdqn.learn.targets import group_values, lambda_targets, one_step_targets
from lmdqn.model.qnetwork import QNetwork, StateOutputs, response_log_probs
from lmdqn.model.vocabulary import value_of
from lmdqn.recipe import QLearningSection


@dataclass
class Learnt:
    """A loss and what it was made of, for logging."""

    loss: Tensor  # () summed over the batch's residuals, in nats squared (classic: reward squared)
    residuals: Tensor  # (B, T) detached, or (B, 1) for a path loss
    log_ratios: Tensor  # (B, T) log(pi / pi_0) in nats, detached
    values: Tensor  # (B, T) V(s_t) of the online network, reward units, detached


def q_loss(batch: Batch, online: QNetwork, target: QNetwork, recipe: QLearningSection) -> Learnt:
    """The recipe's loss on one batch, differentiable in the online network alone."""
    loss_of = {"dueling": _dueling_loss, "classic": _classic_loss}[recipe.form]
    if recipe.loss == "path":
        loss_of = _path_loss
    return loss_of(batch, online, target, recipe)


def loss_terms(batch: Batch, recipe: QLearningSection) -> int:
    """How many residuals the batch's loss sums: tokens, or episodes."""
    return len(batch.response_mask) if recipe.loss == "path" else int(batch.response_mask.sum())


def _dueling_loss(batch: Batch, online: QNetwork, target: QNetwork, recipe: QLearningSection) -> Learnt:
    """Q(s, a) = V(s) + beta log(pi/pi_0)(a|s) against soft TD(lambda) targets; residuals in nats."""
    outputs = online(batch)
    log_ratios = _log_ratios(batch, outputs)
    values = batch.at_states(outputs.values)  # (B, T + 1)
    with torch.no_grad():
        target_values = batch.at_states(target(batch, need_logits=False).values)
        y = lambda_targets(
            batch.rewards, target_values, log_ratios, batch.response_mask, recipe.gamma, recipe.trace, recipe.beta
        )
    residuals = (values[:, :-1] - y) / recipe.beta + log_ratios
    return _learnt(residuals, batch.response_mask, log_ratios, values, recipe)


def _path_loss(batch: Batch, online: QNetwork, target: QNetwork, recipe: QLearningSection) -> Learnt:
    """One residual an episode, the prompt's value in closed form from its group."""
    outputs = online(batch)
    log_ratios = _log_ratios(batch, outputs)
    returns = batch.rewards.sum(1) - recipe.beta * log_ratios.detach().sum(1)
    first_values = group_values(returns, batch.groups)
    residuals = path_residuals(first_values, log_ratios, batch.rewards, batch.response_mask, recipe.beta)
    values = first_values[:, None].expand(-1, log_ratios.shape[1] + 1)
    every_episode = torch.ones_like(residuals, dtype=torch.bool)[:, None]
    return _learnt(residuals[:, None], every_episode, log_ratios, values, recipe)


def _classic_loss(batch: Batch, online: QNetwork, target: QNetwork, recipe: QLearningSection) -> Learnt:
    """Q(s, a) is the raw logit and y = r + gamma max_a Q(s', a): DQN as published, the baseline to beat."""
    outputs = online(batch)
    q = batch.at_tokens(value_of(outputs.logits, batch.actions))
    with torch.no_grad():
        best = batch.at_states(target(batch).logits.float().amax(-1))
        y = one_step_targets(batch.rewards, best, recipe.gamma)
        values = batch.at_states(outputs.logits.float().amax(-1))
    return _learnt(q - y, batch.response_mask, _log_ratios(batch, outputs), values, recipe)


def _learnt(residuals: Tensor, mask: Tensor, log_ratios: Tensor, values: Tensor, recipe: QLearningSection) -> Learnt:
    loss = residual_loss(residuals, mask, recipe.huber_delta)
    return Learnt(loss, (residuals * mask).detach(), log_ratios.detach(), values[:, :-1].detach())


def _log_ratios(batch: Batch, outputs: StateOutputs) -> Tensor:
    return (response_log_probs(batch, outputs) - batch.reference_log_probs) * batch.response_mask
