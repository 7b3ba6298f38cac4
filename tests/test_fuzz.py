"""Whatever stands in a recipe or a data file: `check`, and `train` until it begins, end well or in one sentence.

Neither has written anything by then.

`LMDQN_FUZZ=5000 pytest tests/test_fuzz.py` tries more.
"""

import contextlib
import copy
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdqn.cli import main
from lmdqn.errors import UserError
from lmdqn.recipe import Recipe, validate
from tests.runs import write_splits

TRIES = int(os.environ.get("LMDQN_FUZZ", "60"))
SOUND: dict[str, Any] = {
    "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": {"n_layer": 1, "n_embd": 24}}},
    "data": {"path": "data"},
    "warm_start": {"epochs": 1},
}
WHOLE = validate(SOUND, "fuzz").model_dump(mode="json")
LINE = {"source": "say one", "references": ["it is one", "one"]}

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["a.py:f", "1e-4"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
many = settings(max_examples=TRIES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def paths_of(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*path, key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sound data."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_splits(folder / "data", [LINE])
    return folder


def call(command: str, folder: Path, *words: str) -> tuple[int, str]:
    """`lmdqn COMMAND recipe.yaml WORDS` in the folder: exit code and standard error; nothing may have been written.

    Training stops where it has found all sound and would make its folder.
    """
    before = sorted(folder.rglob("*"))
    told = io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(io.StringIO()),
        patch("lmdqn.pipeline.Run.begin", side_effect=UserError("all is sound")),
    ):
        arguments, sys.argv = sys.argv, ["lmdqn", command, "recipe.yaml", *words]
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            sys.argv = arguments
    assert sorted(folder.rglob("*")) == before
    return code, told.getvalue()


def assert_in_one_sentence(code: int, told: str) -> None:
    assert code in (0, 2), told
    assert "Traceback" not in told
    if code == 2:
        said = re.sub(r"\Aexamples: .*\n", "", told)  # training tells what it read
        assert said.startswith(("lmdqn: ", "Usage: ")), told


commands = st.sampled_from(["check", "train"])


@many
@given(command=commands, path=st.sampled_from(sorted(paths_of(WHOLE))), value=values)
def test_any_value_anywhere(folder: Path, command: str, path: tuple[str, ...], value: Any) -> None:
    tree = copy.deepcopy(WHOLE)
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    try:
        text = yaml.safe_dump(tree, allow_unicode=True)
    except yaml.YAMLError:
        return
    (folder / "recipe.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert_in_one_sentence(*call(command, folder))


@many
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_for_a_recipe(folder: Path, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    code, told = call("check", folder)
    assert code == 2
    assert_in_one_sentence(code, told)


@many
@given(word=st.sampled_from(["", *sorted(Recipe.model_fields)]), rest=st.text(max_size=20))
def test_any_override(folder: Path, word: str, rest: str) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SOUND), encoding="utf-8")
    assert_in_one_sentence(*call("check", folder, "--", word + rest))


rows = st.dictionaries(st.sampled_from(["source", "references", "extra"]), values, max_size=3)
lines = st.lists(rows | values, max_size=4).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())


@many
@given(command=commands, name=st.sampled_from(["train.jsonl", "train.csv", "train.parquet"]), data=st.data())
def test_any_data(folder: Path, command: str, name: str, data: st.DataObject) -> None:
    """Bytes, or JSON lines; in CSV and Parquet, also a sound file in which some bytes are others."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SOUND), encoding="utf-8")
    sound = folder / "data" / "train.jsonl"
    whole = sound.read_bytes()
    content = data.draw(st.binary(max_size=80) | lines)
    if name != "train.jsonl" and data.draw(st.booleans()):
        content = damaged(SOUND_FILES[name], data)
    sound.unlink()
    (folder / "data" / name).write_bytes(content)
    try:
        assert_in_one_sentence(*call(command, folder))
    finally:
        (folder / "data" / name).unlink()
        sound.write_bytes(whole)


def damaged(content: bytes, data: st.DataObject) -> bytes:
    changed = bytearray(content)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        changed[place] = data.draw(st.integers(0, 255))
    return bytes(changed)


def _sound_files() -> dict[str, bytes]:
    table, parquet = pa.table({"source": ["say one", "two"], "references": [["it is one"], ["two"]]}), io.BytesIO()
    pq.write_table(table, parquet)
    return {"train.csv": b"source,references\nsay one,it is one\n", "train.parquet": parquet.getvalue()}


SOUND_FILES = _sound_files()
