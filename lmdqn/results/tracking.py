"""What a run logs: every key with its unit and formula, `metrics.jsonl`, and progress in the terminal."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmdqn.errors import writing
from lmdqn.results.trackers import Trackers

LOGGED = {
    "phase": "mle or dqn",
    "step": "updates of the MLE phase; rollouts of the DQN phase",
    "seconds": "wall-clock seconds of the phase so far, evaluation not counted",
    "loss": "mle: cross-entropy, nats a token; dqn: mean half squared (or Huber) residual over tokens, nats squared "
    "(path: over episodes; classic: reward squared); mean over the step's updates",
    "rate_factor": "learning rate over its peak",
    "gradient_norm": "L2 norm of the gradient before clipping; mean over the step's updates",
    "reward": "mean reward R of the step's sampled episodes",
    "reward_<term>": "mean of one term of the reward mix, unweighted, over the episodes whose task has it",
    "reward_of_<task>": "mean reward of the step's episodes of one task, where there are several",
    "response_tokens": "mean length of the step's sampled responses, EOS included",
    "truncated_share": "share of the step's sampled responses without EOS",
    "equal_groups_share": "share of prompt groups whose sampled rewards are all equal: no signal with baseline=group",
    "repeated_4grams": "mean share of repeated 4-grams in the step's sampled responses",
    "behaviour_nats": "mean of -log mu(y_t | s_t) over sampled tokens, mu the behaviour policy: its entropy, estimated",
    "kl_nats": "mean over the step's sampled episodes that were kept of sum_t log(pi / pi_0)(y_t | s_t), pi as it was "
    "at the first update on them: KL to the reference a response, estimated",
    "kl_first_nats": "the same against the first reference, with reference_reset_every",
    "value_explained": "1 - var(R - b - V(s_t)) / var(R - b) over the tokens of the step's updates",
    "residual_nats": "mean |residual| over the step's updates (classic: in reward)",
    "epsilon": "epsilon-greedy exploration: share of uniform choices",
    "replay_episodes": "episodes held by the replay, an offline log left out",
    "skipped_updates": "steps skipped so far because a gradient, reward or logit was not finite; absent while 0",
    "episodes_per_s": "sampled episodes over the seconds of the phase",
    "validation_<metric>": "metric of greedy responses to the validation split, by the target network; reward and "
    "those of the results table; of several tasks the mean, by their weights",
    "validation_<task>_<metric>": "the same of one task, where there are several",
}


class Tracker:
    """Appends to `metrics.jsonl` and shows a person where the run is: a live line, or plain lines in a pipe."""

    def __init__(self, console: Console | None = None, plain_every_s: float = 10.0):
        self.console = console or Console(stderr=True)
        self.plain_every_s = plain_every_s
        self._file: Path | None = None
        self._trackers: Trackers | None = None
        self._live: tuple[Progress, TaskID] | None = None
        self._limits: tuple[str, int, float | None] | None = None  # of the phase that is under way
        self._last_plain_s = 0.0
        self._shown: dict[str, float] = {}

    def write_to(self, file: Path, after_bytes: int = 0) -> None:
        """From now on, append records to this file, whatever stands after its first `after_bytes` dropped."""
        self._file = file
        if file.exists():
            with writing(file):
                os.truncate(file, min(after_bytes, file.stat().st_size))

    @property
    def bytes_written(self) -> int:
        """Where the next record will stand in the file."""
        return self._file.stat().st_size if self._file is not None and self._file.exists() else 0

    def tell(self, trackers: Trackers) -> None:
        """From now on, tell the trackers what is written to the file."""
        self._trackers = trackers

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, max_steps: int, max_seconds: float | None = None) -> Iterator[None]:
        """Show progress towards either limit while inside."""
        self._limits = (name, max_steps, max_seconds)
        self._shown = {}
        self._last_plain_s = time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[news]}"))
            with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as progress:
                self._live = progress, progress.add_task(name, total=1.0, news="")
                yield
        else:
            yield
        self._limits = self._live = None

    def log(self, phase: str, record: dict[str, Any], write: bool = True) -> None:
        """Show a step's numbers, and write them as one line when `write` is set."""
        if write and self._file is not None:
            line = {"phase": phase, **record}
            with writing(self._file), self._file.open("a", encoding="utf-8") as metrics:
                metrics.write(json.dumps({k: _rounded(v) for k, v in line.items()}) + "\n")
        if write and self._trackers is not None:
            self._trackers.log(phase, record)
        self._shown |= record
        self._show()

    def _show(self) -> None:
        if self._limits is None:
            return
        name, max_steps, max_seconds = self._limits
        step, seconds = self._shown.get("step", 0), self._shown.get("seconds", 0.0)
        done = max(step / max(1, max_steps), seconds / max_seconds if max_seconds else 0.0)
        labels = (("reward", "reward"), ("loss", "loss"), ("kl_nats", "KL"), ("validation_reward", "validation"))
        news = [f"step {step}", f"{step / max(seconds, 1e-9):.1f}/s"]
        news += [f"{label} {self._shown[key]:.3f}" for key, label in labels if key in self._shown]
        if self._live is not None:
            progress, task = self._live
            progress.update(task, completed=min(1.0, done), news="  ".join(news))
        elif time.monotonic() - self._last_plain_s >= self.plain_every_s:
            self._last_plain_s = time.monotonic()
            left = max(0.0, seconds * (1 - done) / max(done, 1e-9))
            self.say(f"{name} {100 * min(1.0, done):3.0f}%  {'  '.join(news)}  {left:.0f} s left")


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
