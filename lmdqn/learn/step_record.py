"""The numbers a step logs, computed from its rollout and its updates; `tracking.LOGGED` defines each of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from lmdqn.episodes import Batch, Episode
from lmdqn.learn.objective import Learnt
from lmdqn.learn.replay import Group


@dataclass
class Update:
    """One update as it was made, by micro-batch."""

    parts: list[list[Episode]]
    batches: list[Batch]
    learnt: list[Learnt]
    terms: int  # residuals the loss is a mean over
    gradient_norm: float


def rollout_record(groups: Sequence[Group]) -> dict[str, float]:
    """Reward, length and behaviour of a rollout's sampled episodes."""
    by_group = [[e for e in group if not e.demonstration] for group in groups]
    sampled = [e for group in by_group for e in group]
    behaviour = torch.cat([e.behaviour_log_probs for e in sampled if e.behaviour_log_probs is not None])
    return {
        "reward": fmean(e.reward for e in sampled),
        **{f"reward_{name}": fmean(e.terms[name] for e in sampled) for name in sampled[0].terms},
        "response_tokens": fmean(len(e.response_ids) for e in sampled),
        "truncated_share": fmean(e.truncated for e in sampled),
        "equal_groups_share": fmean(len({e.reward for e in group}) == 1 for group in by_group),
        "behaviour_nats": -float(behaviour.mean()),
    }


def update_record(updates: Sequence[Update], fresh_groups: Collection[int]) -> dict[str, float]:
    """Loss, residuals, KL to the reference and the value head's fit over a step's updates."""
    terms = sum(update.terms for update in updates)
    learnt = [part for update in updates for part in update.learnt]
    record = {
        "loss": sum(float(part.loss.detach()) for part in learnt) / terms,
        "residual_nats": sum(float(part.residuals.abs().sum()) for part in learnt) / terms,
        "gradient_norm": fmean(update.gradient_norm for update in updates),
        "value_explained": _explained(updates),
    }
    if path_kl := _fresh_path_kl(updates[0], fresh_groups):
        record["kl_nats"] = fmean(path_kl)
    return record


def _fresh_path_kl(update: Update, fresh_groups: Collection[int]) -> list[float]:
    """sum_t log(pi / pi_0) of each freshly sampled episode in the update."""
    sums = []
    for part, learnt in zip(update.parts, update.learnt, strict=True):
        for episode, path in zip(part, learnt.log_ratios.sum(1).tolist(), strict=True):
            if episode.group in fresh_groups and not episode.demonstration:
                sums.append(path)
    return sums


def _explained(updates: Sequence[Update]) -> float:
    """1 - var(R - b - V) / var(R - b) over tokens; 0 where the returns do not vary."""
    returns, values = [], []
    for update in updates:
        for batch, learnt in zip(update.batches, update.learnt, strict=True):
            mask = batch.response_mask
            returns.append(batch.rewards.sum(1, keepdim=True).expand(mask.shape)[mask])
            values.append(learnt.values[mask])
    r, v = torch.cat(returns), torch.cat(values)
    spread = float(r.var())
    return 1 - float((r - v).var()) / spread if spread > 0 else 0.0
