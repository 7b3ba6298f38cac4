"""Brings a public data set into the common form: {train,validation,test}.jsonl of source and references.

    python data/prepare.py samsum --out my_data/samsum              # from the Hugging Face hub
    python data/prepare.py multiwoz --from MultiWOZ_2.2 --out DIR   # from a copy on this machine
    python data/prepare.py wmt16 --pair ro-en --out DIR
    python data/prepare.py list

A copy may hold the hub's files (JSONL, CSV, Parquet, or a folder saved by `datasets`) or those the authors publish.
`origin.json` beside the data notes where they came from, their licence, what was left out, and each file's SHA-256.

A source that stands in two splits is kept in test before validation before training, so that no model learns what it
is measured on.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Source = str | list[str]  # a text, or the turns of a dialogue, the newest last
Pair = tuple[Source, list[str]]
SPLITS = ("train", "validation", "test")
ALSO_CALLED = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
NO_TEXT = {"schema", "act", "emotion"}  # SGD's services, DailyDialog's labels: files beside the dialogues
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
PARQUET = "refs/convert/parquet"  # the hub's own conversion of sets that are made by a script


class PrepareError(Exception):
    """What the person who started this can mend, in one sentence."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    history: int  # turns of context before a reply
    pair: tuple[str, str]  # languages: source, target


@dataclass(frozen=True)
class PublicSet:
    """Where a set is and how its rows are read. The licence is what its hub card, or its authors, say."""

    title: str
    hub: str
    licence: str
    homepage: str
    read: Callable[[Row, Options], Iterator[Pair]]
    config: Callable[[Options], str | None] = lambda options: None
    revision: str | None = None


def columns(source: str, *references: str) -> Callable[[Row, Options], Iterator[Pair]]:
    """Rows with a column of source text; the first of the reference columns that is there holds one reference."""

    def read(row: Row, options: Options) -> Iterator[Pair]:
        name = next((name for name in references if name in row), references[0])
        yield row[source], [row[name]]

    return read


def dialogsum(row: Row, options: Options) -> Iterator[Pair]:
    """The authors' test rows hold summary1, summary2 and summary3; everywhere else there is one summary."""
    summaries = [row[name] for name in ("summary", "summary1", "summary2", "summary3") if name in row]
    if not summaries:
        raise KeyError("summary")
    yield row["dialogue"], summaries


def facts(row: Row, options: Options) -> Iterator[Pair]:
    """E2E: the hub's columns, or the challenge's own (mr, ref)."""
    if "mr" in row:
        yield row["mr"], [row["ref"]]
    else:
        yield row["meaning_representation"], [row["human_reference"]]


def conversation(row: Row, options: Options) -> Iterator[Pair]:
    """DailyDialog: every reply, after some turns of history. The authors' text files part turns by __eou__."""
    turns = row["dialog"] if "dialog" in row else row["text"].split("__eou__")
    turns = [turn.strip() for turn in turns if turn.strip()]
    for reply in range(1, len(turns)):
        yield turns[max(0, reply - options.history) : reply], [turns[reply]]


def service(row: Row, options: Options) -> Iterator[Pair]:
    """MultiWOZ 2.2 and SGD: the system's replies.

    The authors' JSON has a list of turns, the hub's conversion one record of lists; speakers are USER and SYSTEM,
    or 0 and 1.
    """
    turns = row["turns"]
    if isinstance(turns, dict):
        turns = [
            {"speaker": speaker, "utterance": said}
            for speaker, said in zip(turns["speaker"], turns["utterance"], strict=True)
        ]
    texts = [turn["utterance"].strip() for turn in turns]
    for reply, turn in enumerate(turns):
        if reply and turn["speaker"] in ("SYSTEM", 1):
            yield texts[max(0, reply - options.history) : reply], [texts[reply]]


def translation(row: Row, options: Options) -> Iterator[Pair]:
    """WMT and IWSLT: a record of a text in each language."""
    source, target = options.pair
    yield row["translation"][source], [row["translation"][target]]


SETS = {
    "cnn_dailymail": PublicSet(
        "CNN/DailyMail 3.0.0, non-anonymised: news articles and their highlights",
        "abisee/cnn_dailymail",
        "Apache-2.0",
        "https://github.com/abisee/cnn-dailymail",
        columns("article", "highlights"),
        config=lambda options: "3.0.0",
    ),
    "xsum": PublicSet(
        "XSum: BBC articles and one-sentence summaries",
        "EdinburghNLP/xsum",
        "not stated",
        "https://github.com/EdinburghNLP/XSum",
        columns("document", "summary"),
        revision=PARQUET,
    ),
    "samsum": PublicSet(
        "SAMSum: chat dialogues and summaries",
        "knkarthick/samsum",
        "CC BY-NC-ND 4.0",
        "https://arxiv.org/abs/1911.12237",
        columns("dialogue", "summary"),
    ),
    "dialogsum": PublicSet(
        "DialogSum: spoken dialogues and summaries, three references on test",
        "knkarthick/dialogsum",
        "CC BY-NC-SA 4.0",
        "https://github.com/cylnlp/dialogsum",
        dialogsum,
    ),
    "dailydialog": PublicSet(
        "DailyDialog: open-domain conversations, every reply after some turns",
        "li2017dailydialog/daily_dialog",
        "CC BY-NC-SA 4.0",
        "http://yanran.li/dailydialog",
        conversation,
        revision=PARQUET,
    ),
    "multiwoz": PublicSet(
        "MultiWOZ 2.2: service dialogues, the system's replies",
        "pfb30/multi_woz_v22",
        "Apache-2.0",
        "https://github.com/budzianowski/multiwoz",
        service,
        config=lambda options: "v2.2",
        revision=PARQUET,
    ),
    "sgd": PublicSet(
        "Schema-Guided Dialogue: service dialogues, the system's replies",
        "google-research-datasets/schema_guided_dstc8",
        "CC BY-SA 4.0",
        "https://github.com/google-research-datasets/dstc8-schema-guided-dialogue",
        service,
        config=lambda options: "dialogues",
        revision=PARQUET,
    ),
    "e2e_nlg": PublicSet(
        "E2E NLG: restaurant facts into words, several references",
        "tuetschek/e2e_nlg",
        "CC BY-SA 4.0",
        "https://arxiv.org/abs/1706.09254",
        facts,
        revision=PARQUET,
    ),
    "wmt16": PublicSet(
        "WMT 2016 news translation; --pair, one side being en",
        "wmt/wmt16",
        "for research; see the sources of each part",
        "https://www.statmt.org/wmt16",
        translation,
        config=lambda options: "-".join(sorted(options.pair, key=lambda language: language == "en")),
    ),
    "iwslt2017": PublicSet(
        "IWSLT 2017: talks; --pair",
        "IWSLT/iwslt2017",
        "CC BY-NC-ND 4.0",
        "https://sites.google.com/site/iwsltevaluation2017",
        translation,
        config=lambda options: f"iwslt2017-{options.pair[0]}-{options.pair[1]}",
        revision=PARQUET,
    ),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def hub_rows(wanted: PublicSet, split: str, options: Options) -> Iterator[Row]:
    """A split from the hub."""
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # its client would tell of each retry
    try:
        yield from datasets.load_dataset(wanted.hub, wanted.config(options), split=split, revision=wanted.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise PrepareError(f"cannot load {wanted.hub} [{split}] from the hub: {reason}") from error


def local_rows(folder: Path, split: str) -> Iterator[Row]:
    """A split from a copy: TRAIN.SUFFIX, files whose name begins or ends so, or a folder of that name."""
    if (folder / "dataset_dict.json").exists():
        import datasets

        yield from datasets.load_from_disk(str(folder))[split]
        return
    files = split_files(folder, split)
    if not files:
        names = " or ".join(ALSO_CALLED[split])
        raise PrepareError(
            f"{folder} has no files of the {split} split: expected {names} in a .jsonl, .json, .csv, ... name"
        )
    for file in files:
        try:
            yield from file_rows(file)
        except (OSError, ValueError) as error:
            raise PrepareError(f"cannot read {file}: {error}") from error


def split_files(folder: Path, split: str) -> list[Path]:
    """The split's files, in order: those of `train/`, else those named train, dialogsum.train or trainset."""
    for name in ALSO_CALLED[split]:
        if (folder / name).is_dir():
            files = sorted(file for file in (folder / name).iterdir() if file.suffix in SUFFIXES)
            return [file for file in files if not NO_TEXT & set(file.stem.split("_"))]
    named = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES and is_of(file, split)]
    best = [file for file in named if "w_refs" in file.stem]  # E2E's test set comes without references, too
    return best or named


def is_of(file: Path, split: str) -> bool:
    """Whether a file's name says that it is of a split."""
    words = file.stem.lower().replace("-", "_").replace(".", "_").split("_")
    return any(word.removesuffix("set") in ALSO_CALLED[split] for word in words)


def file_rows(file: Path) -> Iterator[Row]:
    """Rows of one file by its suffix; a .txt file has a column, text."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    with file.open(encoding="utf-8-sig", newline="" if file.suffix == ".csv" else None) as lines:
        if file.suffix == ".json":
            yield from json.load(lines)
        elif file.suffix == ".csv":
            csv.field_size_limit(2**31 - 1)
            yield from csv.DictReader(lines)
        elif file.suffix == ".jsonl":
            yield from (json.loads(line) for line in lines if line.strip())
        else:
            yield from ({"text": line} for line in lines if line.strip())


# --- from rows to files -----------------------------------------------------------------------------------------------


def pairs_of(wanted: PublicSet, rows: Iterator[Row], split: str, options: Options) -> tuple[list[Pair], int]:
    """The split's pairs, equal sources merged in order of first appearance; and how many rows were empty."""
    merged: dict[str, Pair] = {}
    empty = 0
    for number, row in enumerate(rows, start=1):
        try:
            found = list(wanted.read(row, options))
        except (KeyError, TypeError, AttributeError) as error:
            there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise PrepareError(f"{split}, row {number}: no column {error}; there are {there}") from error
        for source, references in found:
            source = [tidy(turn) for turn in source] if isinstance(source, list) else tidy(source)
            references = [reference for reference in map(tidy, references) if reference]
            if not (references and source and all(source)):
                empty += 1
                continue
            known = merged.setdefault(json.dumps(source), (source, []))[1]
            known += [reference for reference in dict.fromkeys(references) if reference not in known]
    return list(merged.values()), empty


def tidy(text: str | None) -> str:
    """One kind of line break, nothing around the text."""
    return "\n".join(line.rstrip() for line in (text or "").splitlines()).strip()


def prepare(name: str, copy: Path | None, out: Path, options: Options) -> dict[str, Any]:
    """Write the set to `out`, complete or not at all; gives what `origin.json` says.

    Raises:
        PrepareError: the folder is there already, or the set cannot be had or read.
    """
    wanted = SETS[name]
    if out.exists():
        raise PrepareError(f"{out} is already there: choose another folder")
    splits, empty, repeated = {}, {}, {}
    seen: set[str] = set()
    for split in reversed(SPLITS):
        rows = local_rows(copy, split) if copy is not None else hub_rows(wanted, split, options)
        pairs, empty[split] = pairs_of(wanted, rows, split, options)
        splits[split] = [pair for pair in pairs if json.dumps(pair[0]) not in seen]
        repeated[split] = len(pairs) - len(splits[split])
        seen |= {json.dumps(source) for source, _ in pairs}
        if not splits[split]:
            raise PrepareError(f"the {split} split of {name} holds no pairs")
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    files = {split: write(fresh / f"{split}.jsonl", splits[split]) for split in SPLITS}
    origin = {
        "set": name,
        "title": wanted.title,
        "licence": wanted.licence,
        "homepage": wanted.homepage,
        "from": copy.name if copy is not None else wanted.hub,
        "config": None if copy is not None else wanted.config(options),
        "revision": None if copy is not None else wanted.revision,
        "history": options.history if wanted.read in (conversation, service) else None,
        "pair": "-".join(options.pair) if wanted.read is translation else None,
        "examples": {split: len(splits[split]) for split in SPLITS},
        "left_out_empty": {split: empty[split] for split in SPLITS},
        "left_out_in_a_later_split_too": {split: repeated[split] for split in SPLITS},
        "sha256": files,
    }
    (fresh / "origin.json").write_text(json.dumps(origin, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, out)
    return origin


def write(file: Path, pairs: Sequence[Pair]) -> str:
    """Write a split; gives its SHA-256."""
    lines = [json.dumps({"source": s, "references": r}, ensure_ascii=False) + "\n" for s, r in pairs]
    content = "".join(lines).encode()
    file.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*SETS, "list"], metavar="SET", help=f"{', '.join(SETS)}, or list")
    parser.add_argument("--out", type=Path, help="the new folder")
    parser.add_argument("--from", type=Path, dest="copy", metavar="DIR", help="a copy on this machine")
    parser.add_argument("--history", type=int, default=4, help="turns before a reply, in dialogues [default: 4]")
    parser.add_argument("--pair", default="de-en", help="languages of a translation, source first [default: de-en]")
    chosen = parser.parse_args(arguments)
    if chosen.set == "list":
        for name, public in SETS.items():
            print(f"{name:14} {public.title} ({public.licence})")
        return
    source, dash, target = chosen.pair.partition("-")
    if chosen.out is None or not dash or chosen.history < 1:
        parser.error("--out DIR is needed, --pair reads like de-en, --history is 1 or more")
    try:
        origin = prepare(chosen.set, chosen.copy, chosen.out, Options(chosen.history, (source, target)))
    except PrepareError as error:
        print(f"prepare: {error}", file=sys.stderr)
        sys.exit(2)
    sizes = ", ".join(f"{count} {split}" for split, count in origin["examples"].items())
    print(f"{chosen.out}: {sizes}; licence: {origin['licence']}")


if __name__ == "__main__":
    main()
