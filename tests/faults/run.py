"""Break runs on purpose and see that they go on: `python tests/faults/run.py [--kills 100]`, as root for the full disk.

A run of a second is killed at random moments and inside file operations, its disk filled, its folder made read-only,
its checkpoints damaged. Each time it is resumed, and what it leaves must equal, bit for bit, what a run leaves that was
never disturbed. Prints a Markdown table; ends with 1 where anything differed.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import lmdqn
from lmdqn.cli.common import quiet_libraries
from lmdqn.errors import Stopped, UserError
from lmdqn.recipe import Recipe, validate
from lmdqn.results.tracking import Tracker
from tests.runs import contents, write_splits

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
MODEL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}


def recipe(data: Path, run: Path) -> Recipe:
    """A run of a second: a checkpoint each step, in MLE and in DQN, a replay and demonstrations."""
    tree: dict[str, Any] = {
        "seed": 3,
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": MODEL}},
        "data": {"path": str(data), "max_response_tokens": 8},
        "warm_start": {"epochs": 2, "batch_examples": 4},
        "rollout": {"prompts": 3, "samples": 2},
        "replay": {"batch_groups": 3, "fresh_share": 0.5, "demonstrations": 1, "capacity_episodes": 20},
        "qlearning": {"max_steps": 8},
        "evaluation": {"every_steps": 2, "bootstrap_samples": 100},
        "output": {"dir": str(run), "log_every_steps": 1, "checkpoint_every_steps": 1, "keep_checkpoints": 2},
    }
    return validate(tree, "faults")


def write_data(folder: Path) -> Path:
    rows = [{"source": f"say {word}", "references": [f"it is {word}", f"we say {word}"]} for word in WORDS]
    return write_splits(folder, rows)


class Silent(Tracker):
    def say(self, text: str) -> None:
        pass


# --- a run in a child process, which may die ------------------------------------------------------------------------


def start(run: Recipe, harm: Callable[[], None] | None = None) -> int:
    """The process id of a child that trains (or resumes); its exit status says how it ended: 0, or 2 for UserError."""
    if child := os.fork():
        return child
    code = 1
    try:
        if harm is not None:
            harm()
        lmdqn.train(run, Silent(), resume=True)
        code = 0
    except UserError as error:
        told_file().write_text(str(error), encoding="utf-8")
        code = 2
    except Stopped as stopped:
        code = 128 + stopped.signal_number
    finally:
        os._exit(code)


def finish(run: Recipe, harm: Callable[[], None] | None = None) -> int:
    """Run or resume to the end in a child: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(start(run, harm), 0)[1])


def told_file() -> Path:
    """Where a child writes the sentence that it ended with: not on the disk that is being filled."""
    return Path(tempfile.gettempdir()) / "lmdqn_told.txt"


def kill_at_file_operation(number: int) -> Callable[[], None]:
    """Harm: the process kills itself at its so-manieth move, sync or removal of a file, or half-way through a write."""

    def harm() -> None:
        left = number

        def counting(operation: Callable[..., Any], after: bool) -> Callable[..., Any]:
            def counted(*arguments: Any, **named: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0 and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = operation(*arguments, **named)
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return counted

        from lmdqn.learn import checkpoint

        after = number % 2 == 0
        for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (checkpoint, "save_file")):
            setattr(module, name, counting(getattr(module, name), after))

    return harm


# --- what is tried ----------------------------------------------------------------------------------------------------


class Bench:
    """A folder to break things in, and what an undisturbed run leaves."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.data = write_data(folder / "data")
        straight = self.recipe("straight")
        lmdqn.train(straight, Silent())  # in this process, so that its children have every import behind them
        began = time.perf_counter()
        assert finish(self.recipe("again")) == 0
        self.seconds = time.perf_counter() - began
        self.expected = contents(Path(straight.output.dir))
        assert self.equal(self.recipe("again"))
        self.rows: list[tuple[str, int, int, str]] = []

    def recipe(self, name: str) -> Recipe:
        return recipe(self.data, self.folder / name)

    def count(self, what: str, tried: int, sound: int, remark: str) -> None:
        self.rows.append((what, tried, sound, remark))
        print(f"| {what} | {tried} | {sound} | {remark} |", flush=True)

    def equal(self, run: Recipe) -> bool:
        """Does the run's folder hold what the undisturbed run's does?"""
        return contents(Path(run.output.dir)) == self.expected

    def drop(self, run: Recipe) -> None:
        shutil.rmtree(run.output.dir, ignore_errors=True)  # killed before it was made


def killed_at_random(bench: Bench, kills: int, draw: random.Random) -> None:
    """Runs that end before their moment comes do not count."""
    sound = killed = 0
    while killed < kills:
        run = bench.recipe(f"random{killed}")
        child = start(run)
        time.sleep(draw.uniform(0, bench.seconds))
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            killed += 1
            sound += finish(run) == 0 and bench.equal(run)
        bench.drop(run)
    bench.count("kill -9 at a random moment", kills, sound, "")


def killed_in_file_operations(bench: Bench, tries: int, draw: random.Random) -> None:
    sound = killed = 0
    for i in range(tries):
        run = bench.recipe(f"operation{i}")
        killed += finish(run, kill_at_file_operation(draw.randint(1, 130))) == -signal.SIGKILL
        sound += finish(run) == 0 and bench.equal(run)
        bench.drop(run)
    bench.count("kill -9 inside a write, move, sync or removal", tries, sound, f"{killed} died of it")


def killed_often(bench: Bench, tries: int, draw: random.Random) -> None:
    """One run, killed again and again on its way."""
    run, kills = bench.recipe("often"), 0
    for _ in range(tries):
        child = start(run)
        time.sleep(draw.uniform(0.3 * bench.seconds, 0.6 * bench.seconds))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    bench.count(f"one run killed {kills} times", 1, int(finish(run) == 0 and bench.equal(run)), "")
    bench.drop(run)


def damaged(bench: Bench, tries: int, draw: random.Random) -> None:
    for what in ("cut short", "with a flipped bit"):
        sound = 0
        for i in range(tries):
            run = bench.recipe(f"damaged{i}")
            finish(run, kill_at_file_operation(draw.randint(60, 120)))
            checkpoints = Path(run.output.dir) / "checkpoints"
            newest = max(checkpoints.glob("*-??????"))  # the link may not have been moved yet
            file = newest / draw.choice(["tensors.safetensors", "state.json", "manifest.json"])
            content = bytearray(file.read_bytes())
            if what == "cut short":
                content = content[: draw.randrange(len(content))]
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
            sound += finish(run) == 0 and bench.equal(run)
            bench.drop(run)
        bench.count(f"newest checkpoint {what}", tries, sound, "the one before was used")


@contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(bench: Bench, tries: int, draw: random.Random) -> None:
    """The disk fills up somewhere on the way; then it is made larger, and the run goes on."""
    needed_kib = sum(f.stat().st_size for f in (bench.folder / "straight").rglob("*") if f.is_file()) // 1024
    sound = told = 0
    for i in range(tries):
        with small_disk(bench.folder / f"disk{i}", draw.randint(needed_kib // 8, needed_kib)) as disk:
            run = recipe(bench.data, disk / "run")
            code = finish(run)
            subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
            told += code == 2 and "No space left" in told_file().read_text(encoding="utf-8")
            sound += finish(run) == 0 and bench.equal(run)
    bench.count("disk full", tries, sound, f"{told} told so in one sentence")


def read_only(bench: Bench, draw: random.Random) -> None:
    """Root may write anywhere, so the folder is mounted read-only."""
    with small_disk(bench.folder / "locked", 100_000) as disk:
        run = recipe(bench.data, disk / "run")
        finish(run, kill_at_file_operation(90))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        done = subprocess.run(
            [sys.executable, "-m", "lmdqn", "train", str(disk / "run" / "recipe.yaml"), "--resume"],
            capture_output=True,
            text=True,
        )
        told = done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        sound = told and finish(run) == 0 and bench.equal(run)
    bench.count("read-only folder", 1, int(sound), "told in one sentence")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)  # a forked child waits for ever for the threads that OpenMP had in its parent
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print(f"an undisturbed run takes {bench.seconds:.1f} s", flush=True)
        print("\n| fault | tried | went on bit for bit | |\n|---|---|---|---|", flush=True)
        killed_at_random(bench, arguments.kills - arguments.kills // 2, draw)
        killed_in_file_operations(bench, arguments.kills // 2, draw)
        killed_often(bench, max(1, arguments.kills // 10), draw)
        damaged(bench, max(1, arguments.kills // 10), draw)
        if os.geteuid() == 0:
            full_disk(bench, max(1, arguments.kills // 10), draw)
            read_only(bench, draw)
    sys.exit(any(tried != sound for _, tried, sound, _ in bench.rows))


if __name__ == "__main__":
    main()
