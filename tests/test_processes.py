"""Several processes on the CPU (torchrun; `accelerate launch` has none there): they do what one does, none hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.runs import write_splits

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def write_run(folder: Path, **changes: dict[str, Any]) -> Path:
    """A recipe of seconds without dropout, and its data."""
    write_splits(folder, [{"source": f"say {w}", "references": [f"it is {w}", f"we say {w}"]} for w in WORDS])
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, **no_dropout}
    tree: dict[str, Any] = {
        "seed": 3,
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": size}},
        "data": {"path": str(folder), "max_response_tokens": 12},
        "warm_start": {"epochs": 2, "batch_examples": 4},
        "rollout": {"prompts": 5, "samples": 2},
        "replay": {"batch_groups": 5, "fresh_share": 0.5, "demonstrations": 1},
        "qlearning": {"max_steps": 4, "huber_delta": 10.0},
        "evaluation": {"every_steps": 2, "bootstrap_samples": 100},
        "output": {"dir": str(folder / "run"), "log_every_steps": 1},
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


def launch(processes: int, recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, f"--nproc-per-node={processes}", "-m", "lmdqn", "train", str(recipe), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "episodes_per_s")} for line in lines]


def assert_close(one: Path, other: Path) -> None:
    """The same episodes, and numbers to within rounding (1e-4)."""
    first, second = metrics(one), metrics(other)
    assert len(first) == len(second)
    for line, again in zip(first, second, strict=True):
        assert line.pop("phase") == again.pop("phase")
        assert line == pytest.approx(again, rel=2e-3, abs=1e-4)
    for folder in ("model", "last"):
        weights, others = (load_file(run / folder / "model.safetensors") for run in (one, other))
        for name, weight in weights.items():
            torch.testing.assert_close(weight, others[name], atol=1e-4, rtol=0)
    states = [json.loads((run / "checkpoints" / "last" / "state.json").read_text()) for run in (one, other)]
    texts = [state["learner"]["replay"]["episodes"]["$episodes"]["text"] for state in states]
    assert len(texts[0]) == 5 * 3 * 4
    assert texts[0] == texts[1]
    assert (one / "predictions.jsonl").read_bytes() == (other / "predictions.jsonl").read_bytes()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    """Five prompts between two: shares differ in size, and responses in length."""
    alone, together = write_run(tmp_path / "alone"), write_run(tmp_path / "together")
    done = subprocess.run([sys.executable, "-m", "lmdqn", "train", str(alone)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with launch(2, together) as processes:
        told, complaints = processes.communicate(timeout=120)
    assert processes.returncode == 0, complaints
    assert told.count("predictions.jsonl") == 1  # one of them speaks
    assert "learning in 2 processes" in complaints
    assert_close(alone.parent / "run", together.parent / "run")


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """One of two is killed, which ends the other within a minute; one alone goes on from there."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n\ndef score(responses, references, sources):\n"
        "    time.sleep(0.3)\n    return [len(set(r)) for r in responses]\n"
    )
    changes: dict[str, dict[str, Any]] = {
        "reward": {"mix": {f"{slow}:score": 1}},
        "output": {"checkpoint_every_steps": 1},
    }
    straight, killed = write_run(tmp_path / "straight", **changes), write_run(tmp_path / "killed", **changes)
    with launch(2, killed) as processes:
        while not (killed.parent / "run" / "checkpoints" / "dqn-000001").exists():
            assert processes.poll() is None, processes.communicate()
            time.sleep(0.01)
        victim = _workers(processes.pid)[-1]
        began = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        _, told = processes.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert processes.returncode != 0
    assert "another process of this run has ended" in told
    for arguments in ([str(killed), "--resume"], [str(straight)]):
        done = subprocess.run([sys.executable, "-m", "lmdqn", "train", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert_close(straight.parent / "run", killed.parent / "run")


def _workers(parent: int) -> list[int]:
    """The processes that a launcher started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_a_share_for_each_process(tmp_path: Path) -> None:
    recipe = write_run(tmp_path / "few", rollout={"prompts": 1})
    with launch(2, recipe) as processes:
        _, told = processes.communicate(timeout=60)
    assert processes.returncode != 0
    assert "rollout.prompts=1 is too few for 2 processes" in told
    assert not (tmp_path / "few" / "run").exists()
