"""How long the command line takes to start."""

import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from speed.table import Line, Settings


def start(settings: Settings) -> Iterator[Line]:
    """Start-up, by the wall clock."""
    recipe = Path(__file__).parents[3] / "recipes" / "from_scratch_causal.yaml"
    check = ["check", str(recipe), f"data.path={settings.data}"]
    commands = {
        "lmdqn --help": ([sys.executable, "-m", "lmdqn", "--help"], 0.4),
        "import lmdqn": ([sys.executable, "-c", "import lmdqn"], 0.2),
        "lmdqn check RECIPE": ([sys.executable, "-m", "lmdqn", *check], 1.5),
    }
    for name, (command, bar) in commands.items():
        run = lambda c=command: settings.seconds(lambda: subprocess.run(c, capture_output=True, check=True))  # noqa: E731
        times = [run() for _ in range(settings.repeats + 1)][1:]
        yield Line(name, f"{statistics.median(times):.2f} s", f"{bar} s", [t / bar for t in times], "<= 1")
