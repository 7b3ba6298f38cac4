"""Reading pairs: formats, columns, references, conversations, order, and what is refused in which words."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmdqn.errors import UserError
from lmdqn.recipe import Conversation, DataSection, Limits, Splits
from lmdqn.text.data import Pair, load_pairs

Rows = Sequence[dict[str, Any]]
WriteData = Callable[..., Path]
ROWS: Rows = [
    {"id": f"nr{i}", "source": f"Grüße {i}, “quoted”, and more", "references": f'answer "{i}",\nover two lines'}
    for i in range(6)
]


def write_jsonl(folder: Path, split: str, rows: Rows) -> None:
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")


def write_csv(folder: Path, split: str, rows: Rows) -> None:
    with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(folder: Path, split: str, rows: Rows) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), folder / f"{split}.parquet")


def save_dataset(folder: Path, splits: dict[str, Rows]) -> None:
    import datasets

    dataset = datasets.DatasetDict({split: datasets.Dataset.from_list(list(rows)) for split, rows in splits.items()})
    dataset.save_to_disk(str(folder))


def write_format(kind: str, folder: Path, rows: Rows) -> None:
    """The same rows as every split."""
    folder.mkdir()
    if kind == "saved":
        save_dataset(folder, {"train": rows, "validation": rows, "test": rows})
        return
    for split in ("train", "validation", "test"):
        {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}[kind](folder, split, rows)


def pairs(path: Path, split: str = "test", seed: int = 0, **settings: Any) -> list[Pair]:
    return load_pairs(DataSection(path=str(path), **settings), split, seed)


def refusal(path: Path | None, split: str = "test", **settings: Any) -> str:
    data = DataSection(path=None if path is None else str(path), **settings)
    with pytest.raises(UserError) as refused:
        load_pairs(data, split, 0)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "saved"])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_format_gives_the_same_pairs(tmp_path: Path, kind: str, split: str) -> None:
    write_format(kind, tmp_path / "data", ROWS)
    found = pairs(tmp_path / "data", split)
    wanted = [Pair(row["source"], (row["references"],), row) for row in ROWS]
    assert sorted(found, key=lambda pair: pair.source) == wanted


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_lists_and_records_in_every_format_that_has_them(tmp_path: Path, kind: str) -> None:
    rows = [
        {"translation": {"ro": "unu", "en": "one"}, "answers": {"text": ["a", "b"]}},
        {"translation": {"ro": "doi", "en": "two"}, "answers": {"text": ["c"]}},
    ]
    write_format(kind, tmp_path / "data", rows)
    translated = pairs(tmp_path / "data", source="translation.ro", references="translation.en")
    assert [(p.source, p.references) for p in translated] == [("unu", ("one",)), ("doi", ("two",))]
    answered = pairs(tmp_path / "data", source="translation.en", references="answers.text")
    assert [(p.source, p.references) for p in answered] == [("one", ("a", "b")), ("two", ("c",))]


def test_csv_cells_are_text(tmp_path: Path) -> None:
    rows = [{"source": "007", "references": "2024-01-05"}, {"source": "12", "references": "2024-02-06"}]
    write_format("csv", tmp_path / "data", rows)
    assert [(p.source, p.references) for p in pairs(tmp_path / "data")] == [
        ("007", ("2024-01-05",)),
        ("12", ("2024-02-06",)),
    ]


def test_a_csv_row_with_a_comma_too_many_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("source,references\none,a\ntwo, or 2,b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"test.csv, row 2: more cells .* quote"):
        pairs(tmp_path)


def test_long_csv_with_lines_in_its_cells(tmp_path: Path) -> None:
    """Longer than the blocks that pyarrow reads a CSV in, so that some block ends inside a quoted cell."""
    rows = [{"source": f"{i}\n" + "some words\n" * 4000, "references": f"{i}"} for i in range(60)]
    write_format("csv", tmp_path / "data", rows)
    assert [p.source for p in pairs(tmp_path / "data")] == [row["source"] for row in rows]


def test_a_folder_may_mix_formats(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "train", ROWS)
    write_csv(tmp_path, "validation", ROWS)
    write_parquet(tmp_path, "test", ROWS)
    by_split = [{p.source for p in pairs(tmp_path, split)} for split in ("train", "validation", "test")]
    assert by_split[0] == by_split[1] == by_split[2] == {row["source"] for row in ROWS}


def test_blank_lines_of_jsonl_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('\n{"source": "a", "references": "b"}\n  \n', encoding="utf-8")
    assert pairs(tmp_path) == [Pair("a", ("b",), {"source": "a", "references": "b"})]


def test_splits_may_have_other_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "dev", ROWS)
    found = load_pairs(DataSection(path=str(tmp_path), splits=Splits(validation="dev")), "validation", 0)
    assert len(found) == len(ROWS)


# --- columns and references ---------------------------------------------------------------------------------------


def test_columns_are_mapped(write_data: WriteData) -> None:
    rows = [{"article": "long text", "highlights": "short text", "source": "unused"}]
    found = pairs(write_data(rows), source="article", references="highlights")
    assert found == [Pair("long text", ("short text",), rows[0])]


def test_a_dotted_column_may_also_be_a_plain_name(write_data: WriteData) -> None:
    rows = [{"text.en": "plain", "text": {"en": "nested"}, "references": "r"}]
    assert pairs(write_data(rows), source="text.en")[0].source == "plain"


def test_without_references(write_data: WriteData) -> None:
    assert pairs(write_data([{"source": "a"}]), references=None) == [Pair("a", (), {"source": "a"})]


def test_rows_of_equal_prompt_become_one_example_with_all_different_references(write_data: WriteData) -> None:
    rows = [
        {"source": "a", "references": ["1", "2"]},
        {"source": "b", "references": ["3"]},
        {"source": "a", "references": ["2", "4", "1"]},
    ]
    found = pairs(write_data(rows))
    assert [(p.source, p.references) for p in found] == [("a", ("1", "2", "4")), ("b", ("3",))]
    assert found[0].row == rows[0]


def test_rows_stay_apart_where_another_column_of_the_template_differs(write_data: WriteData) -> None:
    rows = [
        {"source": "a", "question": "who", "year": 1, "references": "1"},
        {"source": "a", "question": "when", "year": 2, "references": "2"},
        {"source": "a", "question": "who", "year": 3, "references": "3"},
    ]
    found = pairs(write_data(rows), prompt="{question}? {source}")
    assert [(p.row["question"], p.references) for p in found] == [("who", ("1", "3")), ("when", ("2",))]


def test_merging_can_be_turned_off(write_data: WriteData) -> None:
    rows = [{"source": "a", "references": "1"}, {"source": "a", "references": "2"}]
    assert [p.references for p in pairs(write_data(rows), merge_references=False)] == [("1",), ("2",)]


# --- order and limits ---------------------------------------------------------------------------------------------

MANY: Rows = [{"source": f"source {i}", "references": "r"} for i in range(40)]
IN_FILE_ORDER = [row["source"] for row in MANY]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_seed_fixes_the_order(write_data: WriteData, split: str) -> None:
    folder = write_data(MANY)
    orders = [[p.source for p in pairs(folder, split, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert IN_FILE_ORDER not in orders
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(IN_FILE_ORDER)


def test_the_test_split_keeps_its_order(write_data: WriteData) -> None:
    assert [p.source for p in pairs(write_data(MANY), "test", seed=5)] == IN_FILE_ORDER


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_limit_takes_the_first_of_the_same_order(write_data: WriteData, split: str) -> None:
    folder = write_data(MANY)
    limited = pairs(folder, split, 3, limits=Limits(train=7, validation=7, test=7))
    assert limited == pairs(folder, split, 3)[:7]
    assert len(limited) == 7


def test_a_limit_counts_examples_after_merging(write_data: WriteData) -> None:
    rows = [{"source": source, "references": reference} for source in "ab" for reference in "123"]
    found = pairs(write_data(rows), limits=Limits(test=2))
    assert [(p.source, p.references) for p in found] == [("a", ("1", "2", "3")), ("b", ("1", "2", "3"))]


# --- conversations ------------------------------------------------------------------------------------------------


def test_every_reply_of_a_conversation_is_learnt(write_data: WriteData) -> None:
    rows = [{"dialog": ["Hi.", "Hello!", "How are you?", "Fine."]}]
    found = pairs(write_data(rows), conversation=Conversation(history=2))
    assert [(p.source, p.references, p.turns) for p in found] == [
        ("Hi.", ("Hello!",), (("user", "Hi."),)),
        ("Hi.\nHello!", ("How are you?",), (("assistant", "Hi."), ("user", "Hello!"))),
        ("Hello!\nHow are you?", ("Fine.",), (("assistant", "Hello!"), ("user", "How are you?"))),
    ]


def test_history_may_be_longer_than_the_conversation(write_data: WriteData) -> None:
    found = pairs(write_data([{"talk": ["a", "b", "c"]}]), conversation=Conversation(column="talk", history=9))
    assert [(p.source, p.references) for p in found] == [("a", ("b",)), ("a\nb", ("c",))]


def test_messages_with_roles_are_a_conversation(write_data: WriteData) -> None:
    """Whoever replies is the assistant."""
    messages = [{"role": "patient", "content": "It hurts."}, {"role": "doctor", "content": "Where?"}]
    found = pairs(write_data([{"dialog": messages}]), conversation=Conversation())
    assert [(p.references, p.turns) for p in found] == [(("Where?",), (("user", "It hurts."),))]


def test_a_source_may_be_turns(write_data: WriteData) -> None:
    found = pairs(write_data([{"source": ["a", "b", "c"], "references": "d"}]))
    assert [(p.source, p.references, p.turns) for p in found] == [
        ("a\nb\nc", ("d",), (("user", "a"), ("assistant", "b"), ("user", "c")))
    ]


def test_a_source_may_be_messages_that_keep_their_roles(write_data: WriteData) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    found = pairs(write_data([{"source": messages, "references": "d"}]))
    assert [(p.source, p.turns) for p in found] == [("Be brief.\nWhy?", (("system", "Be brief."), ("user", "Why?")))]


def test_equal_contexts_share_their_replies(write_data: WriteData) -> None:
    rows = [{"dialog": ["Hi.", "Hello!"]}, {"dialog": ["Hi.", "Good day."]}]
    found = pairs(write_data(rows), conversation=Conversation())
    assert [(p.source, p.references) for p in found] == [("Hi.", ("Hello!", "Good day."))]


# --- refusals -----------------------------------------------------------------------------------------------------


def test_no_data_named() -> None:
    assert "data.path=FOLDER" in refusal(None)


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").startswith(f"data.path {tmp_path / 'none'} is not a folder")


def test_missing_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "train", ROWS)
    assert refusal(tmp_path) == f"{tmp_path} has no test.jsonl, test.csv or test.parquet"


def test_malformed_line(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"source": "a", "references": "b"}\n\n{"source": "a", \n', encoding="utf-8")
    assert refusal(tmp_path).startswith(f"{file}, line 3: not valid JSON")


def test_line_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes(b'{"source": "a", "references": "b"}\n{"source": "\xff"}\n')
    assert refusal(tmp_path) == f"{tmp_path / 'test.jsonl'}, line 2: not valid JSON (not UTF-8)"


def test_line_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('["a", "b"]\n', encoding="utf-8")
    assert refusal(tmp_path) == f"{tmp_path / 'test.jsonl'}, line 1: must be an object of columns, not list"


@pytest.mark.parametrize(("kind", "name"), [("csv", "CSV"), ("parquet", "Parquet")])
def test_file_that_is_not_what_it_is_called(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / f"test.{kind}").write_text("" if kind == "csv" else "no parquet", encoding="utf-8")
    assert refusal(tmp_path).startswith(f"{tmp_path}/test.{kind} is not valid {name}")


@pytest.mark.parametrize(
    ("settings", "missing", "meant"),
    [
        ({"source": "sorce"}, "sorce", "source"),
        ({"references": "reference"}, "reference", "references"),
        ({"source": "source.text"}, "source.text", "source"),
    ],
)
def test_missing_column_names_the_nearest(
    write_data: WriteData, settings: dict[str, str], missing: str, meant: str
) -> None:
    folder = write_data()
    assert refusal(folder, **settings) == f"{folder}/test.jsonl, line 1: no column {missing!r}; did you mean {meant!r}?"


def test_missing_column_of_a_conversation(write_data: WriteData) -> None:
    folder = write_data([{"dialogue": ["a", "b"]}])
    assert refusal(folder, conversation=Conversation()).endswith("no column 'dialog'; did you mean 'dialogue'?")


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(
        '{"source": "a", "references": "b"}\n\n{"references": "b"}\n', encoding="utf-8"
    )
    assert refusal(tmp_path).startswith(f"{tmp_path}/test.jsonl, line 3: no column 'source'")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "saved"])
def test_empty_split(tmp_path: Path, kind: str) -> None:
    if kind == "jsonl":
        (tmp_path / "test.jsonl").write_text("\n", encoding="utf-8")
    elif kind == "csv":
        (tmp_path / "test.csv").write_text("source,references\n", encoding="utf-8")
    else:
        import datasets

        empty = datasets.Dataset.from_list(list(ROWS)).filter(lambda row: False)
        datasets.DatasetDict({"test": empty}).save_to_disk(str(tmp_path))
    assert refusal(tmp_path).endswith(": the test split is empty")


def test_conversations_of_one_turn_are_an_empty_split(write_data: WriteData) -> None:
    assert refusal(write_data([{"dialog": ["a"]}]), conversation=Conversation()).endswith("split is empty")


@pytest.mark.parametrize("references", [[], None, 3, ["a", None], {"text": "a"}])
def test_references_that_are_none(write_data: WriteData, references: Any) -> None:
    folder = write_data([{"source": "a", "references": "b"}, {"source": "c", "references": references}])
    assert refusal(folder) == (
        f"{folder}/test.jsonl, line 2: the references must be text or a list of at least one text"
    )


@pytest.mark.parametrize(("source", "kind"), [(3, "int"), (None, "NoneType"), ({"text": "a"}, "dict")])
def test_source_that_is_no_text(write_data: WriteData, source: Any, kind: str) -> None:
    folder = write_data([{"source": source, "references": "b"}])
    assert refusal(folder) == f"{folder}/test.jsonl, line 1: column 'source' must hold text, not {kind}"


@pytest.mark.parametrize(
    "turns", ["not a list", [], None, ["a", 3], [{"role": "user"}], [{"role": "user", "content": None}, "a"]]
)
def test_conversation_that_is_none(write_data: WriteData, turns: Any) -> None:
    folder = write_data([{"dialog": turns}])
    assert refusal(folder, conversation=Conversation()).startswith(f"{folder}/test.jsonl, line 1: ")


@pytest.mark.parametrize("as_source", [True, False])
def test_messages_without_text(write_data: WriteData, as_source: bool) -> None:
    """As chat logs hold them where a tool was called."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, {"role": "user", "content": "b"}]
    folder = write_data([{"dialog": turns, "references": "c"}])
    settings: dict[str, Any] = {"source": "dialog"} if as_source else {"conversation": Conversation()}
    assert refusal(folder, **settings).startswith(f"{folder}/test.jsonl, line 1: ")


def test_missing_split_of_a_saved_folder(tmp_path: Path) -> None:
    save_dataset(tmp_path, {"train": ROWS, "tests": ROWS})
    assert refusal(tmp_path) == f"{tmp_path} has no split 'test'; did you mean 'tests'?"


def test_hub_without_network() -> None:
    sentence = refusal(None, hub="nobody-at-all/no-such-data")
    assert sentence.startswith("cannot load nobody-at-all/no-such-data [test] from the hub or its cache: ")
