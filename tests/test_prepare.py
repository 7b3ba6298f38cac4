"""`data/prepare.py` on small files shaped as the public sets publish theirs."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.prepare import SETS, main
from lmdqn.recipe import DataSection
from lmdqn.text.data import load_pairs

Rows = Sequence[dict[str, Any]]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "a copy"
    folder.mkdir()
    return folder


def prepared(name: str, copy: Path, *more: str) -> dict[str, list[dict[str, Any]]]:
    """The rows that `prepare NAME --from COPY` writes, by split."""
    out = copy.parent / "out"
    main([name, "--from", str(copy), "--out", str(out), *more])
    return {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "validation", "test")
    }


def write_jsonl(file: Path, rows: Rows) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(file: Path, rows: Rows) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows), encoding="utf-8")


def write_csv(file: Path, rows: Rows) -> None:
    with file.open("w", encoding="utf-8", newline="") as lines:
        table = csv.DictWriter(lines, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_parquet(file: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(list(rows)), file)


@pytest.mark.parametrize(
    ("name", "source", "reference"),
    [("cnn_dailymail", "article", "highlights"), ("xsum", "document", "summary"), ("samsum", "dialogue", "summary")],
)
def test_summaries_by_their_columns(name: str, source: str, reference: str, copy: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"id": "1", source: f"{split} text\r\nline two ", reference: "short"}]
        write_parquet(copy / f"{split}-00000-of-00001.parquet", rows)
    expected = [{"source": "test text\nline two", "references": ["short"]}]
    assert prepared(name, copy)["test"] == expected


def test_samsums_own_json_with_an_empty_dialogue(copy: Path) -> None:
    for file in ("train", "val", "test"):
        rows = [{"id": "1", "summary": "s", "dialogue": f"A: {file}"}, {"id": "2", "summary": "s", "dialogue": ""}]
        write_json(copy / f"{file}.json", rows)
    assert prepared("samsum", copy)["validation"] == [{"source": "A: val", "references": ["s"]}]
    origin = json.loads((copy.parent / "out" / "origin.json").read_text(encoding="utf-8"))
    assert origin["left_out_empty"] == {"train": 1, "validation": 1, "test": 1}


def test_dialogsum_from_the_hub_and_from_its_authors(copy: Path) -> None:
    """Three rows of one dialogue there, three columns here: three references either way."""
    for split in ("train", "validation"):
        write_csv(copy / f"{split}.csv", [{"id": f"{split}_0", "dialogue": split, "summary": "s", "topic": "t"}])
    rows = [{"id": f"test_0_{n}", "dialogue": "d", "summary": f"s{n}", "topic": "t"} for n in (1, 2, 3)]
    write_csv(copy / "test.csv", rows)
    assert prepared("dialogsum", copy)["test"] == [{"source": "d", "references": ["s1", "s2", "s3"]}]


def test_dialogsums_own_jsonl(copy: Path) -> None:
    for split in ("train", "dev"):
        write_jsonl(copy / f"dialogsum.{split}.jsonl", [{"fname": "f", "dialogue": split, "summary": "s"}])
    rows = [{"fname": "f", "dialogue": "d", "summary1": "a", "topic1": "t", "summary2": "b", "summary3": "a"}]
    write_jsonl(copy / "dialogsum.test.jsonl", rows)
    assert prepared("dialogsum", copy)["test"] == [{"source": "d", "references": ["a", "b"]}]


DIALOGUE = ["Hi !", "Hello .", "How are you ?", "Fine ."]


def test_dailydialog_learns_every_reply(copy: Path) -> None:
    for split in ("train", "validation"):
        write_parquet(copy / f"{split}.parquet", [{"dialog": [split, "yes"], "act": [1, 1], "emotion": [0, 0]}])
    write_parquet(copy / "test.parquet", [{"dialog": DIALOGUE, "act": [1] * 4, "emotion": [0] * 4}])
    assert prepared("dailydialog", copy, "--history", "2")["test"] == [
        {"source": ["Hi !"], "references": ["Hello ."]},
        {"source": ["Hi !", "Hello ."], "references": ["How are you ?"]},
        {"source": ["Hello .", "How are you ?"], "references": ["Fine ."]},
    ]


def test_dailydialogs_own_text(copy: Path) -> None:
    for split in ("train", "validation", "test"):
        (copy / split).mkdir()
        text = f"{split} __eou__ {' __eou__ '.join(DIALOGUE)} __eou__\n"
        (copy / split / f"dialogues_{split}.txt").write_text(text, encoding="utf-8")
        (copy / split / f"dialogues_act_{split}.txt").write_text("1 2 1 2 1\n", encoding="utf-8")
    assert prepared("dailydialog", copy)["test"][0] == {"source": ["test"], "references": ["Hi !"]}


def service_turns(opening: str) -> Rows:
    said = [opening, "Which area?", "North.", "It is booked."]
    return [{"speaker": ("USER", "SYSTEM")[i % 2], "utterance": text, "turn_id": str(i)} for i, text in enumerate(said)]


def service_as_record(opening: str) -> dict[str, Any]:
    turns = service_turns(opening)
    return {"speaker": [i % 2 for i in range(len(turns))], "utterance": [turn["utterance"] for turn in turns]}


def from_authors(copy: Path) -> None:
    for split in ("train", "dev", "test"):
        rows = [{"dialogue_id": "1", "services": ["hotel"], "turns": service_turns(f"A room, {split}.")}]
        write_json(copy / split / "dialogues_001.json", rows)
        write_json(copy / split / "schema.json", [{"service_name": "hotel"}])


def from_the_hub(copy: Path) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"dialogue_id": "1", "services": ["hotel"], "turns": service_as_record(f"A room, {split}.")}]
        write_parquet(copy / f"{split}.parquet", rows)


@pytest.mark.parametrize("name", ["multiwoz", "sgd"])
@pytest.mark.parametrize("write", [from_authors, from_the_hub])
def test_service_dialogues_learn_the_systems_replies(name: str, write: Callable[[Path], None], copy: Path) -> None:
    write(copy)
    assert prepared(name, copy)["test"] == [
        {"source": ["A room, test."], "references": ["Which area?"]},
        {"source": ["A room, test.", "Which area?", "North."], "references": ["It is booked."]},
    ]


def test_e2es_own_csv(copy: Path) -> None:
    for file in ("trainset", "devset"):
        write_csv(copy / f"{file}.csv", [{"mr": f"name[{file}]", "ref": "A pub."}])
    write_csv(copy / "testset.csv", [{"MR": "name[x]"}])
    write_csv(copy / "testset_w_refs.csv", [{"mr": "name[x]", "ref": "X."}, {"mr": "name[x]", "ref": "It is X."}])
    assert prepared("e2e_nlg", copy)["test"] == [{"source": "name[x]", "references": ["X.", "It is X."]}]


@pytest.mark.parametrize("name", ["wmt16", "iwslt2017"])
def test_translation_in_either_direction(name: str, copy: Path) -> None:
    for split in ("train", "validation", "test"):
        write_jsonl(copy / f"{split}.jsonl", [{"translation": {"ro": f"{split} unu", "en": f"{split} one"}}])
    assert prepared(name, copy, "--pair", "en-ro")["test"] == [{"source": "test one", "references": ["test unu"]}]


def test_what_is_noted_and_that_lmdqn_reads_it(copy: Path) -> None:
    """No source of one split stands in another, the rarer split keeping it."""
    write_jsonl(copy / "train.jsonl", [{"dialogue": word, "summary": "s"} for word in ("a", "b", "c", "b")])
    write_jsonl(copy / "validation.jsonl", [{"dialogue": word, "summary": "s"} for word in ("b", "d", "e")])
    write_jsonl(copy / "test.jsonl", [{"dialogue": "c", "summary": "s"}, {"dialogue": "e", "summary": "s"}])
    rows = prepared("samsum", copy)
    assert {split: [row["source"] for row in rows[split]] for split in rows} == {
        "train": ["a"],
        "validation": ["b", "d"],
        "test": ["c", "e"],
    }
    out = copy.parent / "out"
    origin = json.loads((out / "origin.json").read_text(encoding="utf-8"))
    assert origin["licence"] == "CC BY-NC-ND 4.0"
    assert origin["examples"] == {"train": 1, "validation": 2, "test": 2}
    assert origin["left_out_in_a_later_split_too"] == {"train": 2, "validation": 1, "test": 0}
    for split, checksum in origin["sha256"].items():
        assert hashlib.sha256((out / f"{split}.jsonl").read_bytes()).hexdigest() == checksum
    assert str(copy) not in json.dumps(origin)
    assert [pair.source for pair in load_pairs(DataSection(path=str(out)), "test", 0)] == ["c", "e"]


def test_what_cannot_be_prepared_leaves_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(name: str = "samsum") -> str:
        with pytest.raises(SystemExit) as stopped:
            prepared(name, copy)
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip()

    assert "has no files of the test split" in refusal()
    for split in ("train", "validation", "test"):
        write_jsonl(copy / f"{split}.jsonl", [{"text": "x", "summary": "s"}])
    assert refusal() == "prepare: test, row 1: no column 'dialogue'; there are text, summary"
    (copy / "test.jsonl").write_text("{", encoding="utf-8")
    assert f"cannot read {copy / 'test.jsonl'}" in refusal()
    write_jsonl(copy / "test.jsonl", [{"dialogue": " ", "summary": "s"}])
    assert "test split of samsum holds no pairs" in refusal()
    assert sorted(copy.parent.iterdir()) == [copy]
    (copy.parent / "out").mkdir()
    assert "is already there: choose another folder" in refusal()


def test_a_hub_out_of_reach_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own, in which the client's retries do not wait."""
    at_once = "import time; time.sleep = lambda seconds: None; from data.prepare import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", at_once, "samsum", "--out", str(tmp_path / "out")],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("prepare: cannot load knkarthick/samsum [test] from the hub")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_every_set_is_listed_with_its_licence(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(SETS)
    assert all(line.endswith(f"({public.licence})") for line, public in zip(listed, SETS.values(), strict=True))
