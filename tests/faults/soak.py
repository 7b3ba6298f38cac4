"""Does a run hold on to memory or files? `python tests/faults/soak.py [--minutes 120]`, on Linux.

One long run of tiny steps; resident memory and open files are read at every step. Once the replay is full (after a
fifth of the time) the memory's mean over the rest's first and last quarter must agree within 2 %, and no more files
may be open at the end than then.
"""

import argparse
import os
import sys
import tempfile
import time
from array import array
from bisect import bisect
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import lmdqn
from lmdqn.recipe import validate
from lmdqn.results.tracking import Tracker
from tests.faults.run import MODEL, write_data


class Meter(Tracker):
    """Reads this process's memory and open files whenever a step of DQN is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.mib, self.files = array("d"), array("d"), array("i")  # small: they count as memory too

    def log(self, phase: str, record: dict[str, Any], write: bool = True) -> None:
        super().log(phase, record, write)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        self.seconds.append(time.monotonic())
        self.mib.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.files.append(len(os.listdir("/proc/self/fd")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=120)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as folder:
        tree: dict[str, Any] = {
            "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": MODEL}},
            "data": {"path": str(write_data(Path(folder) / "data")), "max_response_tokens": 8},
            "rollout": {"prompts": 4, "samples": 2},
            "replay": {"batch_groups": 4, "fresh_share": 0.5, "capacity_episodes": 200},
            "qlearning": {"max_steps": 10**9, "max_seconds": 60 * minutes},
            "evaluation": {"every_steps": 50, "bootstrap_samples": 100},
            "output": {"dir": f"{folder}/run", "log_every_steps": 1, "checkpoint_every_steps": 50},
        }
        meter = Meter()
        lmdqn.train(validate(tree, "soak"), meter)
    began, ended = meter.seconds[0], meter.seconds[-1]
    first = bisect(meter.seconds, began + 0.2 * (ended - began))
    mib, files = meter.mib[first:], meter.files[first:]
    tenths = [fmean(mib[i * len(mib) // 10 : (i + 1) * len(mib) // 10]) for i in range(10)]
    early, late = fmean(mib[: len(mib) // 4]), fmean(mib[-(len(mib) // 4) :])
    growth = late / early - 1
    print(f"{len(meter.seconds)} steps in {(ended - began) / 60:.1f} minutes: memory {early:.1f} to {late:.1f} MiB")
    print(f"({100 * growth:+.2f} %; by tenths {' '.join(f'{m:.1f}' for m in tenths)})")
    print(f"open files {files[0]} to {files[-1]}")
    sys.exit(growth > 0.02 or files[-1] > files[0])


if __name__ == "__main__":
    main()
