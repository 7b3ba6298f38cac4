"""Checkpoints: everything a stopped run needs to go on bit for bit, checksummed, in files that hold no code.

What is saved is a *state*: a tree of dicts with text keys, lists, text, numbers, booleans, None, tensors and lists of
episodes. Whatever moves while a run learns gives its own by `state()` and takes it back by `restore(state)`, which
gets the same tree with tensors on the CPU. Tensors go to `tensors.safetensors`, the rest to `state.json`, and
`manifest.json` holds the SHA-256 of both.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmdqn.episodes import Episode, Example
from lmdqn.errors import UserError, writing
from lmdqn.learn.packing import PackedEpisodes
from lmdqn.whole_files import swap_in, write_link

State = dict[str, Any]
AfterStep = Callable[[int, bool, bool], None]  # (step, last of its phase, best so far on validation)
TENSORS, REST, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
FORMAT = 5
DATA = "training_data_sha256"  # stands in REST, for which the manifest vouches: nothing vouches for the manifest


class BrokenCheckpointError(Exception):
    """A checkpoint that is not what was written: a file is missing, cut short or changed."""


@dataclass
class Checkpoints:
    """A run's checkpoints: a folder each, named by phase and step, such as `dqn-000123`; links `last` and `best`."""

    folder: Path
    keep: int  # the newest so many stay, and the best
    examples: Sequence[Example]  # what is learnt from

    def names(self) -> list[str]:
        """Every checkpoint, oldest first: all of the MLE phase stand before those of the DQN phase."""
        found = [path.name for path in self.folder.glob("*-*") if (path / MANIFEST).exists() and not path.suffix]
        return sorted(found, key=lambda name: (name.startswith("dqn"), int(name.rpartition("-")[2])))

    def write(self, name: str, state: State, best: str | None) -> None:
        """Write a checkpoint beside and swap it in; drop those too old to be kept, but never `best`.

        Raises:
            UserError: it cannot be written. Those that are there stay as they are.
        """
        tensors: dict[str, Tensor] = {}
        rest = {**_take_tensors(state, "", tensors), DATA: self._data}

        def fill(fresh: Path) -> None:
            save_file(tensors, fresh / TENSORS)
            (fresh / REST).write_text(json.dumps(rest), encoding="utf-8")
            sums = {file: _sha256(fresh / file) for file in (TENSORS, REST)}
            manifest = {"format": FORMAT, "sha256": sums}
            (fresh / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

        with writing(self.folder / name):
            self.folder.mkdir(exist_ok=True)
            swap_in(self.folder / name, fill)
        self.tidy(name, best)

    def tidy(self, name: str, best: str | None) -> None:
        """Link to the newest and the best, and drop those too old to be kept; a kill may have come before that.

        Raises:
            UserError: the folder cannot be written.
        """
        with writing(self.folder):
            write_link(self.folder / "last", name)
            if best is not None:
                write_link(self.folder / "best", best)
            for old in self.names()[: -self.keep]:
                if old not in (best, name):
                    shutil.rmtree(self.folder / old)

    def read(self, name: str) -> State:
        """The state as it was written.

        Raises:
            BrokenCheckpointError: a file is not what the manifest says.
            UserError: it was written for other examples.
        """
        return read_state(self.folder / name, self._data)

    def problem(self, name: str) -> str | None:
        """Why a checkpoint cannot be used; None where it is sound."""
        try:
            self.read(name)
        except BrokenCheckpointError as error:
            return str(error)
        return None

    def newest(self, say: Callable[[str], None]) -> str | None:
        """The name of the newest sound checkpoint, None where none was ever written.

        Broken ones that are newer are said and set aside as NAME.broken.

        Raises:
            UserError: there are checkpoints, and all of them are broken or for other examples.
        """
        names = self.names()
        problems = {}
        for name in reversed(names):
            if (found := self.problem(name)) is not None:
                problems[name] = found
                continue
            for broken, problem in problems.items():
                say(f"{problem}: going back to {name}")
                with writing(self.folder):
                    os.replace(self.folder / broken, _unused(self.folder / f"{broken}.broken"))
            return name
        if problems:
            raise UserError(f"no checkpoint in {self.folder} is sound: {'; '.join(problems.values())}")
        return None

    @cached_property
    def _data(self) -> str:
        """SHA-256 of the examples as the model reads them."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(repr((example.prompt_ids, example.references)).encode())
        return digest.hexdigest()


def read_state(folder: Path, data: str | None = None) -> State:
    """The state in a checkpoint's folder; `data` is the SHA-256 of the examples that it must be of.

    Raises:
        BrokenCheckpointError: a file is not what the manifest says.
        UserError: it was written for other examples.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise BrokenCheckpointError(f"{folder} is of format {manifest['format']}, not {FORMAT}")
        for file, expected in manifest["sha256"].items():
            if _sha256(folder / file) != expected:
                raise BrokenCheckpointError(f"{folder / file} is not what was written (its SHA-256 differs)")
        rest = json.loads((folder / REST).read_text(encoding="utf-8"))
        written_for = rest.pop(DATA)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BrokenCheckpointError(f"{folder} cannot be read ({error})") from error
    if data not in (None, written_for):
        raise UserError(f"the training data are not those of {folder}: the run cannot be resumed")
    return _put_tensors(rest, load_file(folder / TENSORS))


def _unused(path: Path) -> Path:
    number = 1
    wanted = path
    while path.exists():
        number += 1
        path = wanted.with_name(f"{wanted.name}{number}")
    return path


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _take_tensors(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree with a mark for each tensor and each list of episodes; the tensors go into `tensors` by path.

    The examples of episodes stand beside them, each once, so that a state can be read without the data.
    """
    if isinstance(node, Tensor):
        tensors[path] = node.detach().cpu().contiguous()
        return {"$tensor": path}
    if isinstance(node, dict):
        return {key: _take_tensors(part, f"{path}/{key}", tensors) for key, part in node.items()}
    if isinstance(node, (list, tuple)):
        if node and isinstance(node[0], Episode):
            packed = PackedEpisodes.of(node)
            columns = {name: torch.from_numpy(column) for name, column in packed.columns.items()}
            places = {example: place for place, example in enumerate(dict.fromkeys(packed.examples))}
            columns["example"] = torch.tensor([places[example] for example in packed.examples])
            examples = [astuple(example) for example in places]
            return {"$episodes": _take_tensors(columns, path, tensors), "examples": examples, "terms": packed.terms}
        if node and isinstance(node[0], (Tensor, dict, list, tuple)):
            return [_take_tensors(part, f"{path}/{i}", tensors) for i, part in enumerate(node)]
    return node


def _put_tensors(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_put_tensors(part, tensors) for part in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return tensors[node["$tensor"]]
    if "$episodes" in node:
        examples = [Example(*map(_as_tuple, columns)) for columns in node["examples"]]
        columns = {name: column.numpy() for name, column in _put_tensors(node["$episodes"], tensors).items()}
        of_each = [examples[place] for place in columns.pop("example").tolist()]
        return PackedEpisodes(of_each, node["terms"], columns).episodes()
    return {key: _put_tensors(part, tensors) for key, part in node.items()}


def _as_tuple(column: Any) -> Any:
    """What JSON made a list of."""
    return tuple(map(_as_tuple, column)) if isinstance(column, list) else column
