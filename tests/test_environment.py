"""What a run notes about the machine: memory it held at most."""

import subprocess
import sys
from pathlib import Path

import pytest

from lmdqn.results import environment

HOLD = """
import numpy
from lmdqn.results.environment import peak_memory_mib
before = peak_memory_mib()["resident"]
held = numpy.ones(2**20 * 25)  # 200 MiB
del held
print(before, peak_memory_mib()["resident"])
"""


def test_the_peak_counts_what_was_held_and_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLD], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 150 < after - before < 250


def test_where_linux_has_no_account_getrusage_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n")
    here = environment.peak_memory_mib()["resident"]
    monkeypatch.setattr(environment, "STATUS", tmp_path / "status")
    asked = environment.peak_memory_mib()["resident"]
    assert asked > 0.5 * here
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t   2048 kB\nVmRSS:\t 1024 kB\n")
    assert environment.peak_memory_mib()["resident"] == 2.0
