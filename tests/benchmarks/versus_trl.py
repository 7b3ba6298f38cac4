"""lmdqn against TRL's GRPO and RLOO: same checkpoint, prompts, reward, decoder, threads and wall-clock.

    pip install -c constraints.txt -e '.[bench]'
    python tests/benchmarks/versus_trl.py --data DIR --sets e2e_nlg --seconds 180 --seeds 3 --threads 1 --output OUT

DIR holds a folder a set, each with train.jsonl, validation.jsonl and test.jsonl of {"source", "references"}. For each
set, OUT/SET-ARCHITECTURE gets a warm-started checkpoint, made once by lmdqn's MLE phase from the shipped recipe
from_scratch_causal (or, with --architecture seq2seq, from_scratch_seq2seq; TRL has no seq2seq and stays out). From it
every method learns for --seconds of the --clock; validation at --evaluations fixed times is not counted.

Each method is tuned with seed 0, by its best validation reward, over its learning rates (--tune-lrs; where not given,
four a method: TRL and the lean loops 5e-5 to 5e-4, lmdqn 1e-4 to 8e-4). TRL and the lean loops get the best rate of
each set; lmdqn gets one rate for all sets of the command. Then seeds 1 to --seeds run with it and are tested.
A single rate needs no tuning. With --lora every method trains an adapter over the checkpoint, which wants about ten
times the rates: name them.

Interrupt it at will: OUT/SET-ARCHITECTURE/units has a file for each finished (method, rate, schedule, seed), which is
never run again; after a change to lmdqn, delete its files there. After each seed, report.md and table.jsonl (test
scores, paired bootstrap, equal rollouts, tuning) and curves.png in OUT/SET-ARCHITECTURE are written anew from them.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from speed.table import CLOCKS


def main() -> None:
    """Parse, run, report; what the user can mend ends in one sentence."""
    options = _parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(options.threads)  # before torch is imported
    from versus.course import run_all

    from lmdqn.errors import Stopped, UserError

    try:
        run_all(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print("stopped in the warm start: the same command goes on with it", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of sets")
    add("--sets", nargs="+", required=True, help="folders in it")
    add("--output", type=Path, required=True, help="where checkpoints and results are kept")
    add("--architecture", choices=("causal", "seq2seq"), default="causal")
    add("--methods", nargs="+", help="of lmdqn trl_grpo trl_rloo lean_grpo best_of_group more_mle; default: all")
    add("--seconds", type=float, default=180.0, help="of learning, for each run")
    add("--evaluations", type=int, default=6, help="validations in those seconds, evenly spaced")
    add("--seeds", type=int, default=3, help="runs that are compared, after tuning")
    add("--threads", type=int, default=1, help="of torch and tokenizers")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds that the process itself computes, for a machine with other work (one thread)",
    )
    add("--tune-lrs", nargs="+", type=float, help="learning rates for every method, instead of its own four")
    add(
        "--schedules",
        nargs="+",
        choices=("constant", "linear"),
        help="tuned too; TRL: linear, others: the recipe's",
    )
    add("--lora", type=int, metavar="RANK", help="every method trains an adapter of this rank, alpha twice that")
    add("--override", nargs="+", default=[], metavar="KEY=VALUE", help="on the recipe, for warm start and all methods")
    return parser


if __name__ == "__main__":
    main()
