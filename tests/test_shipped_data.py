"""The quick start's data are what their generator writes, and keep their splits apart."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmdqn.shipped import shipped_folder

TASKS = ("summarisation", "dialogue")
SPLITS = ("train", "validation", "test")


def test_the_generator_writes_the_same_bytes_again(tmp_path: Path) -> None:
    generator = shipped_folder("data") / "generate.py"
    subprocess.run([sys.executable, str(generator), "--out", str(tmp_path)], check=True, capture_output=True)
    for task in TASKS:
        for split in SPLITS:
            shipped = shipped_folder("data") / task / f"{split}.jsonl"
            assert (tmp_path / task / f"{split}.jsonl").read_bytes() == shipped.read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_no_source_stands_twice(task: str) -> None:
    sources = []
    for split in SPLITS:
        lines = (shipped_folder("data") / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert all(set(row) == {"source", "references"} and len(row["references"]) == 3 for row in rows)
        sources += [row["source"] for row in rows]
    assert len(sources) == len(set(sources)) == 3600
