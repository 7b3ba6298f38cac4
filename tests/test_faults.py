"""A few of the faults that `tests/faults/run.py` tries by the hundred."""

import subprocess
import sys
from pathlib import Path


def test_runs_that_were_broken_on_purpose_go_on() -> None:
    """Killed at random and inside file operations, a damaged checkpoint; as root a full disk and a read-only folder."""
    command = [sys.executable, str(Path(__file__).parent / "faults" / "run.py"), "--kills", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| kill -9 at a random moment | 2 | 2 |" in done.stdout
    assert "| newest checkpoint with a flipped bit | 1 | 1 |" in done.stdout
