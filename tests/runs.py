"""What tests share: tiny models, and of whole runs data, what they told, and what they left but for the clock."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmdqn.model.loading import LoadedModel, add_lora, load_model
from lmdqn.recipe import Lora, validate
from lmdqn.results.tracking import Tracker

SPLITS = ("train", "validation", "test")
WALL_CLOCK = ("seconds", "episodes_per_s")
Rows = Sequence[Mapping[str, Any]]


def write_splits(folder: Path, rows: Rows, **splits: Rows) -> Path:
    """A folder of JSONL splits, `rows` wherever a split is not given its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in splits.get(split, rows)]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


class Listening(Tracker):
    """Keeps what is told to the person at the terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def contents(run: Path) -> dict[str, Any]:
    """Every file of a run by its path, parsed where numbers of the clock must be left out.

    Checkpoints that were set aside as broken are left out.
    """
    found: dict[str, Any] = {
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir() if path.suffix != ".broken")
    }
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if ".broken/" in name:
            continue
        if name.endswith("metrics.jsonl"):
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines]
        elif file.name == "results.json":
            results = json.loads(file.read_text(encoding="utf-8"))
            found[name] = {k: v for k, v in results.items() if k not in ("seconds", "environment", "peak_memory_mib")}
        elif file.name == "state.json":
            state = _flat(json.loads(file.read_text(encoding="utf-8")))
            dull = ("seconds", "elapsed_s", "metrics_bytes", "recipe/output")
            found[name] = {k: v for k, v in state.items() if not any(word in k for word in dull)}
        elif file.is_file() and file.name not in ("manifest.json", "recipe.yaml", "report.html"):
            found[name] = file.read_bytes()
    return found


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if isinstance(node, (dict, list)):
        parts = node.items() if isinstance(node, dict) else enumerate(node)
        return {key: value for k, part in parts for key, value in _flat(part, f"{path}/{k}").items()}
    return {path: node}


def tiny_model(kind: str, sizes: Mapping[str, Mapping[str, Any]]) -> LoadedModel:
    """Random weights of a family, by its fields in `sizes`; `FAMILY lora` comes with an adapter of rank 4."""
    family, _, lora = kind.partition(" ")
    tree = {"from_scratch": {"family": family, "vocabulary_size": 300, "config": dict(sizes[family])}}
    section = validate({"model": tree, "data": {"path": "."}}, "test").model
    loaded = load_model(section, ["the cat sat on the mat"] * 5, seed=0, max_response_tokens=8)
    if lora:
        loaded.model = add_lora(loaded.model, Lora(rank=4), 0).eval()
    return loaded
