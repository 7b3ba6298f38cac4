"""Reading examples: JSONL, CSV, Parquet, folders saved by `datasets`, and the hub, into source and references."""

import csv
import io
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmdqn.errors import UserError
from lmdqn.recipe import DataSection, nearest

Row = dict[str, Any]
PlacedRow = tuple[str, Row]  # where it stands, for errors, and the row
SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Pair:
    """A source with its references, and the row it came from for prompt templates.

    `turns` is set where the source is a dialogue: (role, text) from the oldest to the newest.
    """

    source: str
    references: tuple[str, ...]
    row: Row
    turns: tuple[tuple[str, str], ...] | None = None

    def columns_used(self, template: str) -> dict[str, Any]:
        """The values that a prompt template's {fields} stand for; `source` is always there."""
        values = {**self.row, "source": self.source}
        return {name: values.get(name) for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def load_pairs(data: DataSection, split: str, seed: int) -> list[Pair]:
    """The pairs of one split (`train`, `validation` or `test`), limited, in an order fixed by the seed.

    Training and validation pairs are shuffled before the limit is applied; test pairs keep the file's order.

    Raises:
        UserError: a missing folder, file, split or column, a malformed line (file and line are named), an empty
            split, or a hub data set that cannot be reached.
    """
    import torch  # here, as `count_pairs` is fast without

    pairs = _all_pairs(data, split)
    if split != "test":
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
        pairs = [pairs[i] for i in order.tolist()]
    return pairs[: getattr(data.limits, split)]


def count_pairs(data: DataSection, split: str) -> int:
    """How many `load_pairs` gives; raises as that does."""
    return len(_all_pairs(data, split)[: getattr(data.limits, split)])


def _all_pairs(data: DataSection, split: str) -> list[Pair]:
    origin, rows = _read_rows(data, getattr(data.splits, split))
    pairs = [pair for where, row in rows for pair in _pairs_of(row, data, where)]
    if data.merge_references:
        pairs = _merge_equal_prompts(pairs, data.prompt or "{source}")
    if not pairs:
        raise UserError(f"{origin}: the {split} split is empty")
    return pairs


def read_sources(file: Path, data: DataSection) -> list[Pair]:
    """Sources to respond to: the rows of a .jsonl file, as the recipe reads them, or any other file's lines.

    Raises:
        UserError: the file cannot be read, or a row has no source.
    """
    if file.suffix == ".jsonl":
        alone = data.model_copy(update={"references": None, "conversation": None})
        return [pair for where, row in _read_jsonl(file) for pair in _pairs_of(row, alone, where)]
    try:
        return sources_in(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def sources_in(text: bytes, origin: str) -> list[Pair]:
    """A source a line; raises UserError where that is not UTF-8."""
    try:
        lines = io.StringIO(text.decode("utf-8"), newline=None)  # other line breaks of Unicode's are part of a source
        return [source_alone(line.rstrip("\n")) for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {origin}: not UTF-8") from error


def source_alone(text: str) -> Pair:
    """A source that comes from nowhere but a person."""
    return Pair(text, (), {"source": text})


def _read_rows(data: DataSection, split: str) -> tuple[str, list[PlacedRow]]:
    """What the split is called in errors, and its rows."""
    if data.hub is not None:
        origin = f"{data.hub} [{split}]"
        return origin, _placed(origin, _read_hub(data, split))
    if data.path is None:
        raise UserError("the recipe names no data: set data.path=FOLDER (or data.hub)")
    folder = Path(data.path)
    if not folder.is_dir():
        raise UserError(f"data.path {folder} is not a folder of {split}.jsonl (or .csv, .parquet) files")
    if (folder / "dataset_dict.json").exists():
        origin = f"{folder} [{split}]"
        return origin, _placed(origin, _read_saved(folder, split))
    for suffix in SUFFIXES:
        file = folder / f"{split}{suffix}"
        if file.exists():
            return str(file), read_file(file)
    raise UserError(f"{folder} has no {split}.jsonl, {split}.csv or {split}.parquet")


def read_file(file: Path) -> list[PlacedRow]:
    """The rows of a .jsonl, .csv or .parquet file.

    Raises:
        UserError: it is malformed; file and line are named.
    """
    return _read_jsonl(file) if file.suffix == ".jsonl" else _placed(str(file), _read_table(file))


def _read_jsonl(file: Path) -> list[PlacedRow]:
    rows = []
    if not file.is_file():
        raise UserError(f"cannot read {file}: there is no such file")
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if rb"\ud" in line.lower():  # halves of surrogate pairs, or whole ones
                    json.dumps(row, ensure_ascii=False).encode()  # fails on half of one, which is no text
            except (json.JSONDecodeError, UnicodeError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not valid JSON ({_json_problem(error)})") from error
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: must be an object of columns, not {type(row).__name__}")
            rows.append((f"{file}, line {number}", row))
    return rows


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, UnicodeEncodeError):
        return f"half of a surrogate pair, {error.object[error.start]!a}"
    return "not UTF-8" if isinstance(error, UnicodeError) else "nested too deeply"


def _placed(origin: str, rows: list[Row]) -> list[PlacedRow]:
    return [(f"{origin}, row {number}", row) for number, row in enumerate(rows, start=1)]


def _read_table(file: Path) -> list[Row]:
    return _read_csv(file) if file.suffix == ".csv" else _read_parquet(file)


def _read_csv(file: Path) -> list[Row]:
    """Every cell as text: nothing is guessed to be a date or a number."""
    csv.field_size_limit(2**31 - 1)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            if not reader.fieldnames:
                raise UserError(f"{file} is not valid CSV: it has no header")
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file} is not valid CSV: line {reader.line_num}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row:  # where DictReader puts cells that have no column
            raise UserError(f"{file}, row {number}: more cells than the header has columns: quote cells with commas")
    return rows


def _read_parquet(file: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # of a damaged file, or of text that is not UTF-8
        raise UserError(f"{file} is not valid Parquet: {' '.join(str(error).split())}") from error


def _read_saved(folder: Path, split: str) -> list[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the data set saved in {folder} ({error})") from error
    if split not in saved:
        raise UserError(f"{folder} has no split {split!r}{nearest(split, saved)}")
    return saved[split].to_list()


def _read_hub(data: DataSection, split: str) -> list[Row]:
    import datasets

    assert data.hub is not None
    try:
        return datasets.load_dataset(data.hub, data.hub_config, split=split, revision=data.hub_revision).to_list()
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "; try data.hub_revision=refs/convert/parquet" if "scripts are no longer" in reason else ""
        raise UserError(f"cannot load {data.hub} [{split}] from the hub or its cache: {reason}{hint}") from error


def _pairs_of(row: Row, data: DataSection, where: str) -> Iterator[Pair]:
    """The row's pair; of a whole conversation, one for each reply."""
    if data.conversation is not None:
        turns = _turns(_column(row, data.conversation.column, where), where)
        for reply in range(1, len(turns)):
            yield _dialogue_pair(turns[max(0, reply - data.conversation.history) : reply], turns[reply][1], row)
        return
    source = _column(row, data.source, where)
    references = () if data.references is None else _references(_column(row, data.references, where), where)
    if isinstance(source, list):
        turns = _turns(source, where)
        yield Pair("\n".join(text for _, text in turns), references, row, turns)
    elif isinstance(source, str):
        yield Pair(source, references, row)
    else:
        raise UserError(f"{where}: column {data.source!r} must hold text, not {type(source).__name__}")


def _column(row: Row, name: str, where: str) -> Any:
    """The value of a column; a dot in the name reaches into a record."""
    value: Any = row
    for part in [name] if name in row else name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"{where}: no column {name!r}{nearest(name, row)}")
        value = value[part]
    return value


def _references(value: Any, where: str) -> tuple[str, ...]:
    references = (value,) if isinstance(value, str) else value
    if not isinstance(references, (list, tuple)) or not references or not all(isinstance(r, str) for r in references):
        raise UserError(f"{where}: the references must be text or a list of at least one text")
    return tuple(references)


def _turns(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """Messages with role and content, or plain texts that alternate and end (as a prompt) with the user."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: a conversation must be a list of at least one turn")
    if all(isinstance(turn, str) for turn in value):
        roles = ["user" if (len(value) - i) % 2 else "assistant" for i in range(len(value))]
        return tuple(zip(roles, value, strict=True))
    if all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in value
    ):
        return tuple((turn["role"], turn["content"]) for turn in value)
    raise UserError(f"{where}: each turn must be text, or an object with role and content")


def _dialogue_pair(context: tuple[tuple[str, str], ...], reply: str, row: Row) -> Pair:
    """The reply's speaker is the assistant, whoever that was in the data; roles alternate backwards from it."""
    texts = [text for _, text in context]
    turns = _turns(texts, "conversation")
    return Pair("\n".join(texts), (reply,), row, turns)


def _merge_equal_prompts(pairs: list[Pair], template: str) -> list[Pair]:
    """One pair for each prompt, in order of first appearance, with all its different references."""
    merged: dict[str, list[Pair]] = {}
    for pair in pairs:
        merged.setdefault(repr(pair.columns_used(template)), []).append(pair)
    return [
        replace(same[0], references=tuple(dict.fromkeys(r for pair in same for r in pair.references)))
        for same in merged.values()
    ]
