"""Writes the two synthetic sets, the same bytes on every run and machine.

    python data/generate.py [--out DIR]

`notes.toml` and `dialogues.toml` hold the templates, `words.toml` the names and numbers that fill them. A
template is text with three marks, which may be nested:

    {slot}      a fact
    [a|b|c]     variants of a phrase, the common one first
    (words)     a detail that a writer may leave out
"""

import argparse
import json
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Facts = dict[str, str]
Combination = tuple[str, ...]

HERE = Path(__file__).parent
SEED = 7
SIZES = {"train": 3000, "validation": 300, "test": 300}
TEMPLATES = {"summarisation": "notes.toml", "dialogue": "dialogues.toml"}
REFERENCE_WORDS = range(8, 18)
REFERENCE_COUNT = 3

# A combination belongs to the split that owns the remainder of its index sum divided by ten.
REMAINDERS = {"train": {2, 3, 4, 5, 6, 7, 8, 9}, "validation": {1}, "test": {0}}

INNERMOST_MARK = re.compile(r"\[([^\[\]()]*)\]|\(([^\[\]()]*)\)")
SPACE_BEFORE_STOP = re.compile(r" +([.,:?!])")
SENTENCE_START = re.compile(r"(?:^|[.?!] |(?:USER|SYSTEM): )[a-z]")
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Writer:
    """How someone words a template: the chance of taking the common variant, and of keeping a detail."""

    common: float
    detail: float


SOURCE_WRITER = Writer(common=0.35, detail=0.5)

# Terse annotators mostly agree with one another and verbose ones wander. They choose the phrases of a
# sentence more alike than its build: only a third takes the common one. So following the most frequent next
# word does not lead to the sentence that agrees best with all of them.
COMMON_BUILD = 0.35
ANNOTATORS = (
    Writer(common=0.6, detail=0.1),
    Writer(common=0.55, detail=0.2),
    Writer(common=0.55, detail=0.35),
    Writer(common=0.5, detail=0.45),
    Writer(common=0.45, detail=0.7),
    Writer(common=0.4, detail=0.85),
)


@dataclass(frozen=True)
class Words:
    """The lists of words.toml."""

    lists: Mapping[str, tuple[str, ...]]
    numbers: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls) -> "Words":
        """Read words.toml."""
        table = _load("words.toml")
        numbers = table.pop("numbers")
        return cls(_split_all(table), _split_all(numbers))


@dataclass(frozen=True)
class Topic:
    """One kind of event or dialogue scene: templates for its sources and for each build of a reference."""

    domain: str
    lead: str
    references: tuple[str, ...]
    facts: tuple[str, ...] = ()
    asides: tuple[str, ...] = ()
    slots: Mapping[str, Sequence[str]] = field(default_factory=dict)
    numbers: str = "any"


@dataclass(frozen=True)
class Example:
    """One row, and the combinations shown in its source that no other split shows."""

    source: str
    references: tuple[str, ...]
    combinations: frozenset[Combination]


@dataclass(frozen=True)
class Draws:
    """Random draws for one split.

    All of them come from `Random.random`, the one method whose sequence Python promises to keep.
    """

    rng: random.Random
    split: str

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self.rng.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """Return one item, all being equally likely."""
        return items[int(self.rng.random() * len(items))]

    def variant(self, variants: Sequence[str], common: float) -> str:
        """Return the first variant with the probability `common`, else one of the others."""
        return variants[0] if len(variants) == 1 or self.chance(common) else self.pick(variants[1:])

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` different items in random order."""
        left = list(items)
        return [left.pop(int(self.rng.random() * len(left))) for _ in range(count)]

    def combination(self, *lists: Sequence[str]) -> Combination:
        """Return an entry of each list, such that no other split ever draws these together."""
        while True:
            indices = [int(self.rng.random() * len(entries)) for entries in lists]
            if sum(indices) % 10 in REMAINDERS[self.split]:
                return tuple(entries[index] for entries, index in zip(lists, indices, strict=True))

    def word(self, template: str, facts: Facts, writer: Writer) -> str:
        """Return the template as the writer words it, with the facts filled in."""

        def resolve(mark: re.Match[str]) -> str:
            variants, detail = mark.groups()
            if variants is None:
                return detail if self.chance(writer.detail) else ""
            return self.variant(variants.split("|"), writer.common)

        text, found = template.format_map(facts), 1
        while found:
            text, found = INNERMOST_MARK.subn(resolve, text)
        text = SPACE_BEFORE_STOP.sub(r"\1", " ".join(text.split()))
        return SENTENCE_START.sub(lambda start: start.group()[:-1] + start.group()[-1].upper(), text)


class TemplateSet:
    """All topics of one set, with the facts and phrases they share."""

    def __init__(self, path: str, words: Words) -> None:
        table = _load(path)
        self.words = words
        self.phrases: Mapping[str, str] = table["phrases"]
        self.slots: Mapping[str, Sequence[str]] = table.get("slots", {})
        self.background: Mapping[str, Sequence[str]] = table.get("background", {})
        self.topics = [Topic(**topic) for topic in table["topic"]]

    def draw(self, draws: Draws) -> Example:
        """Return one example, of a topic drawn at random."""
        topic = draws.pick(self.topics)
        facts, combinations = self._draw_facts(topic, draws)
        source = draws.word(self._source_template(topic, draws), facts, SOURCE_WRITER)
        shown = frozenset(parts for parts in combinations if set(parts) <= set(re.findall(r"[\w-]+", source)))
        return Example(source, _references(topic, facts, draws), shown)

    def _draw_facts(self, topic: Topic, draws: Draws) -> tuple[Facts, tuple[Combination, ...]]:
        """Return what happened, and the combinations in it that are kept to this split."""
        lists = self.words.lists
        person, other = (draws.combination(lists["first_names"], lists["last_names"]) for _ in range(2))
        firm = draws.combination(lists["firms"], lists["trades"])
        name = draws.combination(lists["shades"], lists["signs"])
        film = draws.combination(lists["moods"], lists["themes"])
        place, number = draws.combination(lists["places"], self.words.numbers[topic.numbers])
        facts = {slot: draws.pick(values) for slot, values in {**self.slots, **topic.slots}.items()}
        facts["domain"] = topic.domain
        facts |= {"person": " ".join(person), "first_name": person[0], "surname": person[1]}
        facts |= {"other": " ".join(other), "other_surname": other[1], "name": " ".join(name)}
        facts |= {"firm": " ".join(firm), "brand": firm[0], "film": " ".join(film)}
        facts |= {"place": place, "number": number}
        facts["town"] = draws.pick([town for town in lists["places"] if town != place])
        facts["few"], facts["spare"] = draws.sample(lists["small_numbers"], 2)
        facts["month"], facts["later"] = draws.sample(lists["months"], 2)
        facts["day"], facts["other_day"] = draws.sample(lists["days"], 2)
        facts["hour"], facts["other_hour"] = (f"{hour} pm" for hour in draws.sample(lists["clock"], 2))
        facts |= {phrase: template.format_map(facts) for phrase, template in self.phrases.items()}
        return facts, (person, other, firm, name, film, (place, number))

    def _source_template(self, topic: Topic, draws: Draws) -> str:
        """Return the lead, then the facts and two sentences that matter to no summary, in any order."""
        if not topic.asides:
            return topic.lead
        aside = draws.pick(topic.asides)
        distractions = [text for text in (*topic.asides, *self.background[topic.domain]) if text != aside]
        body = (*topic.facts, aside, draws.pick(distractions))
        return " ".join((topic.lead, *draws.sample(body, len(body))))


def _load(name: str) -> dict[str, Any]:
    return tomllib.loads((HERE / name).read_text(encoding="utf-8"))


def _split_all(table: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(entries.split()) for name, entries in table.items()}


def _references(topic: Topic, facts: Facts, draws: Draws) -> tuple[str, ...]:
    """Return the wordings of different annotators, no two of them equal, none too short or too long."""
    references: list[str] = []
    for annotator in draws.sample(ANNOTATORS, REFERENCE_COUNT):
        reference = ""
        while reference in ("", *references) or len(reference.split()) not in REFERENCE_WORDS:
            build = draws.variant(topic.references, COMMON_BUILD)
            reference = draws.word(build, facts, annotator)
        references.append(reference)
    return tuple(references)


def generate_set(name: str, words: Words) -> dict[str, list[Example]]:
    """Return the examples of every split of one set, no source twice."""
    templates = TemplateSet(TEMPLATES[name], words)
    seen: set[str] = set()
    splits: dict[str, list[Example]] = {}
    for split, size in SIZES.items():
        draws = Draws(random.Random(f"{SEED}/{name}/{split}"), split)
        splits[split] = []
        while len(splits[split]) < size:
            example = templates.draw(draws)
            if example.source not in seen:
                seen.add(example.source)
                splits[split].append(example)
    return splits


def check_splits(splits: Mapping[str, Sequence[Example]]) -> None:
    """Assert that held-out rows are new in what they combine, yet use no word that training does not show."""
    known_words = _words_of(splits["train"])
    for split, examples in splits.items():
        elsewhere = [example for other, rows in splits.items() if other != split for example in rows]
        assert not {example.source for example in examples} & {example.source for example in elsewhere}
        taken = frozenset().union(*(example.combinations for example in elsewhere))
        for example in examples:
            assert example.combinations, f"nothing in this source is held out: {example.source}"
            assert not example.combinations & taken, f"another split combines this too: {example.source}"
        assert _words_of(examples) <= known_words, f"{split} has words that train has not"


def _words_of(examples: Sequence[Example]) -> set[str]:
    return {word for row in examples for text in (row.source, *row.references) for word in WORD.findall(text)}


def write_split(path: Path, examples: Sequence[Example]) -> None:
    """Write the examples, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"source": example.source, "references": example.references} for example in examples)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8"))


def main() -> None:
    """Generate, check and write both sets."""
    parser = argparse.ArgumentParser(description="Write the two synthetic sets.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: this one)")
    out = parser.parse_args().out
    words = Words.load()
    for name in TEMPLATES:
        splits = generate_set(name, words)
        check_splits(splits)
        for split, examples in splits.items():
            write_split(out / name / f"{split}.jsonl", examples)


if __name__ == "__main__":
    main()
