"""Train recipes in turn: `python -m tests.several_runs RECIPE[@STEP] ...`, alone or in each of several processes.

Starting a process costs more than a small run. One with @STEP is stopped by a signal to the last process after that
step of Q-learning, and goes on.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

import lmdqn
from lmdqn.cli.common import quiet_libraries
from lmdqn.errors import Stopped
from lmdqn.learn.processes import part
from lmdqn.recipe import load_recipe
from lmdqn.results.tracking import Tracker


class StopAt(Tracker):
    """Sends this process a signal when a step is logged, as a person or a scheduler would."""

    def __init__(self, phase: str, step: int, number: int = signal.SIGTERM):
        super().__init__(Console(quiet=True))
        self.when = (phase, step)
        self.number = number

    def log(self, phase: str, record: dict[str, Any], write: bool = True) -> None:
        super().log(phase, record, write)
        if (phase, record["step"]) == self.when:
            signal.raise_signal(self.number)


def train(words: Sequence[str]) -> None:
    quiet_libraries()
    is_last = int(os.environ.get("RANK", "0")) + 1 == int(os.environ.get("WORLD_SIZE", "1"))
    with patch("lmdqn.pipeline.write_report", lambda folder: None):  # it takes longer than the runs
        for word in words:
            file, _, step = word.partition("@")
            recipe = load_recipe(Path(file))
            if step:
                try:
                    lmdqn.train(recipe, StopAt("dqn", int(step)) if is_last else None)
                except Stopped:
                    print(f"{file} was stopped", flush=True)
            lmdqn.train(recipe, resume=bool(step))


if __name__ == "__main__":
    train(sys.argv[1:])
    part()
