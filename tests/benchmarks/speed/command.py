"""lmdqn's speed and memory against what a user would otherwise run, as one table with ratios and spread.

    OMP_NUM_THREADS=1 taskset -c 1 python tests/benchmarks/speed --data DIR [row ...]

DIR holds train.jsonl of {"source", "references"}; rows are those of `ROWS`, all of them where none is named. The two
sides of a row take turns, --repeats times each after one turn that is not counted; the table shows medians and the
range of the ratios of turns. --clock cpu counts the seconds that the process had its core, and not the wall's: for one
thread on a machine that others use. Memory is a process's peak resident set above what it held before the first update.
`accelerator` needs a CUDA device and no DIR.
"""

import argparse
from pathlib import Path

from speed.accelerator import accelerator
from speed.growth import growth
from speed.memory import adapters, memory, print_peak
from speed.overlap import overlap
from speed.replay import replay
from speed.rollouts import iteration, merged_rollout, rollout
from speed.scoring import scoring
from speed.start import start
from speed.table import CLOCKS, Settings
from speed.updates import checkpointed, compiled, update, update_60m

ROWS = {
    "update": update,
    "update_60m": update_60m,
    "compiled": compiled,
    "checkpointed": checkpointed,
    "memory": memory,
    "adapters": adapters,
    "rollout": rollout,
    "merged_rollout": merged_rollout,
    "iteration": iteration,
    "scoring": scoring,
    "overlap": overlap,
    "replay": replay,
    "growth": growth,
    "start": start,
    "accelerator": accelerator,
}


def main() -> None:
    """The rows that were asked for, each as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"{', '.join(ROWS)}; all where none is named")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl, four references to many sources")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="keeps the warm start of `iteration`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--peak-tflops", type=float, help="of the accelerator in bf16, where its name does not tell")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print_peak(options.peak)
        return
    settings = Settings(options.data, options.output, options.repeats, CLOCKS[options.clock], options.peak_tflops)
    print("| what | lmdqn | the other | ratio (range) | bar |\n|---|---|---|---|---|")
    for name in options.rows or ROWS:
        for line in ROWS[name](settings):
            print(line, flush=True)
