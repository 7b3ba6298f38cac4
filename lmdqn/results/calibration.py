"""Is the value right? What V said of fresh episodes before any update on them, against what then came.

The realised return from state s_t is G_t = sum_{k >= t} gamma^(k - t) (r_k - beta l_k), rewards centred as the updates
centre them and l_k = log(pi / pi_0)(y_k | s_k): what V(s_t) estimates (classic form, and backups that are not soft:
rewards alone).
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmdqn.learn.step_record import Update
from lmdqn.recipe import QLearningSection

Columns = dict[str, np.ndarray]
COLUMNS = {
    "step": "rollout the state is from",
    "episode": "which of the kept episodes",
    "position": "t, tokens already written",
    "tokens": "n, tokens of the whole response",
    "value": "V(s_t), reward units",
    "realised": "G_t, reward units",
}


@dataclass
class Calibration:
    """Keeps the states of the newest rollouts, at most `max_states` of them (but the newest rollout always).

    Truncated responses are left out, as their return is not known; and so is a path loss, which trains no value head.
    """

    recipe: QLearningSection
    max_states: int = 20_000
    _rollouts: deque[Tensor] = field(default_factory=deque)  # (states, COLUMNS) float32 of each
    _episodes: int = 0

    def state(self) -> dict[str, Any]:
        """What is kept, for a checkpoint."""
        return {"rollouts": list(self._rollouts), "episodes": self._episodes}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave."""
        self._rollouts, self._episodes = deque(state["rollouts"]), state["episodes"]

    def add(self, step: int, update: Update, fresh_groups: Collection[int]) -> None:
        """Take in the first update after a rollout: its values were computed before the weights moved."""
        if self.recipe.loss == "path":
            return
        beta = self.recipe.beta if self.recipe.is_soft and self.recipe.form != "classic" else 0.0
        rows: list[tuple[float, ...]] = []
        for part, batch, learnt in zip(update.parts, update.batches, update.learnt, strict=True):
            realised = discounted_sums(batch.rewards - beta * learnt.log_ratios, self.recipe.gamma).tolist()
            for i, (episode, values) in enumerate(zip(part, learnt.values.tolist(), strict=True)):
                if episode.group in fresh_groups and not episode.demonstration and not episode.truncated:
                    n = len(episode.response_ids)
                    rows += [(step, self._episodes, t, n, values[t], realised[i][t]) for t in range(n)]
                    self._episodes += 1
        if rows:
            self._rollouts.append(torch.tensor(rows))
        while len(self._rollouts) > 1 and sum(map(len, self._rollouts)) > self.max_states:
            self._rollouts.popleft()

    def save(self, file: Path) -> None:
        """Write a Parquet file with a row a state; nothing where nothing was kept."""
        import pyarrow
        import pyarrow.parquet

        if self._rollouts:
            whole = torch.cat(list(self._rollouts)).numpy().T
            columns = dict(zip(COLUMNS, whole, strict=True))
            columns |= {name: columns[name].astype(np.int32) for name in ("step", "episode", "position", "tokens")}
            pyarrow.parquet.write_table(pyarrow.table(columns), file)


def read_calibration(file: Path) -> Columns:
    """The columns of a saved file."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(file)
    return {name: table[name].to_numpy() for name in COLUMNS}


def discounted_sums(rewards: Tensor, gamma: float) -> Tensor:
    """sum_{k >= t} gamma^(k - t) r_k for every t. (B, T) -> (B, T)."""
    sums = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + gamma * later
        sums[:, t] = later
    return sums


def explained(values: np.ndarray, realised: np.ndarray) -> float:
    """1 - var(G - V) / var(G); 0 where the returns do not vary."""
    spread = float(realised.var())
    return 1 - float((realised - values).var()) / spread if spread > 0 else 0.0


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, ties sharing their mean rank; 0 where one side does not vary."""
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else 0.0


def reliability(values: np.ndarray, realised: np.ndarray, bins: int = 10) -> list[tuple[float, float, float]]:
    """Equally full bins of states, by their predicted value: mean V, mean G, and the standard error of mean G."""
    order = np.argsort(values, kind="stable")
    rows = []
    for chosen in np.array_split(order, bins):
        if len(chosen):
            g = realised[chosen]
            rows.append((float(values[chosen].mean()), float(g.mean()), float(g.std() / np.sqrt(len(g)))))
    return rows


def by_position(columns: Columns, bins: int = 10) -> list[tuple[float, float, float]]:
    """For each tenth of the response: its middle as a share, Spearman's rank correlation of V and G, and explained."""
    share = columns["position"] / columns["tokens"]  # in [0, 1)
    which = np.minimum((share * bins).astype(int), bins - 1)
    rows = []
    for k in range(bins):
        v, g = columns["value"][which == k], columns["realised"][which == k]
        if len(v) > 1:
            rows.append(((k + 0.5) / bins, rank_correlation(v, g), explained(v, g)))
    return rows


def _ranks(numbers: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]
