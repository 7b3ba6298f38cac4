"""The numbers a step logs, computed from its rollout and its updates; `tracking.LOGGED` defines each of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import TypeVar

import torch

from lmdqn.episodes import Batch, Episode, Example
from lmdqn.learn.objective import Learnt
from lmdqn.learn.replay import Group
from lmdqn.text.metrics import repeated_4grams

Record = TypeVar("Record", Batch, Learnt)
NO_EXAMPLE = Example("", (), (), (), "")
MODEL_INPUTS = ("decoder_ids", "decoder_mask", "position_ids", "states", "encoder_ids", "encoder_mask", "encoder_rows")


@dataclass
class Update:
    """One update as it was made, by micro-batch."""

    parts: list[list[Episode]]
    batches: list[Batch]
    learnt: list[Learnt]
    terms: int  # residuals the loss is a mean over
    gradient_norm: float


def residuals_of_groups(update: Update) -> dict[int, float]:
    """Mean |residual| of each group's tokens (path: episodes), by its number."""
    found: dict[int, list[float]] = {}
    for part, batch, learnt in zip(update.parts, update.batches, update.learnt, strict=True):
        terms = batch.response_mask.sum(1) if learnt.residuals.shape[1] > 1 else torch.ones(len(part))
        means = learnt.residuals.abs().sum(1) / terms.to(learnt.residuals.device)
        for episode, mean in zip(part, means.tolist(), strict=True):
            found.setdefault(episode.group, []).append(mean)
    return {group: fmean(means) for group, means in found.items()}


def for_the_record(update: Update) -> Update:
    """What records read of an update: on the CPU, without gradients, model inputs, and most of the episodes."""
    parts = [[replace(episode, example=NO_EXAMPLE, match_features=None) for episode in part] for part in update.parts]
    batches = [_light(batch) for batch in update.batches]
    return replace(update, parts=parts, batches=batches, learnt=[_light(learnt) for learnt in update.learnt])


def whole_update(shares: Sequence[Update]) -> Update:
    """The update that several processes made together, from what each of them gave."""
    return replace(
        shares[0],
        parts=[part for share in shares for part in share.parts],
        batches=[batch for share in shares for batch in share.batches],
        learnt=[learnt for share in shares for learnt in share.learnt],
    )


def _light(record: Record) -> Record:
    kept = {}
    for name in (field.name for field in fields(record)):
        value = getattr(record, name)
        if isinstance(value, torch.Tensor):
            kept[name] = value[:0] if name in MODEL_INPUTS else value.detach().cpu()
    return replace(record, **kept)


def rollout_record(groups: Sequence[Group]) -> dict[str, float]:
    """Reward, length and behaviour of a rollout's sampled episodes."""
    by_group = [[e for e in group if not e.demonstration] for group in groups]
    sampled = [e for group in by_group for e in group]
    behaviour = torch.cat([e.behaviour_log_probs for e in sampled if e.behaviour_log_probs is not None])
    terms = dict.fromkeys(name for e in sampled for name in e.terms)
    tasks = dict.fromkeys(e.example.task for e in sampled if e.example.task)
    return {
        "reward": fmean(e.reward for e in sampled),
        **{f"reward_of_{task}": fmean(e.reward for e in sampled if e.example.task == task) for task in tasks},
        **{f"reward_{name}": fmean(e.terms[name] for e in sampled if name in e.terms) for name in terms},
        "response_tokens": fmean(len(e.response_ids) for e in sampled),
        "truncated_share": fmean(e.truncated for e in sampled),
        "equal_groups_share": fmean(len({e.reward for e in group}) == 1 for group in by_group),
        "repeated_4grams": fmean(repeated_4grams([e.text for e in sampled])),
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
    if fresh := _fresh_paths(updates[0], fresh_groups):
        record["kl_nats"] = fmean(ratio for _, ratio, _ in fresh)
        if fresh[0][0].first_log_probs is not None:
            record["kl_first_nats"] = fmean(_kl_to_the_first(*path) for path in fresh)
    return record


def _fresh_paths(update: Update, fresh_groups: Collection[int]) -> list[tuple[Episode, float, float]]:
    """Each freshly sampled episode in the update, with sum_t log(pi / pi_0) and sum_t log pi_0."""
    paths = []
    for part, batch, learnt in zip(update.parts, update.batches, update.learnt, strict=True):
        sums = (learnt.log_ratios.sum(1).tolist(), batch.reference_log_probs.sum(1).tolist())
        for episode, ratio, reference in zip(part, *sums, strict=True):
            if episode.group in fresh_groups and not episode.demonstration:
                paths.append((episode, ratio, reference))
    return paths


def _kl_to_the_first(episode: Episode, ratio: float, reference: float) -> float:
    """sum_t log(pi / pi_first)."""
    assert episode.first_log_probs is not None
    return ratio + reference - float(episode.first_log_probs.sum())


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
