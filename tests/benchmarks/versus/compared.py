"""What a report is made of: the results of all methods on one task, and how its tables are written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

import numpy as np

from versus.arena import Settings, Task
from versus.bootstrap import Scores, draw_counts, resampled
from versus.units import METHODS, Result, Setting, better_variant

COLUMNS = {
    "reward": "reward",
    "bleu": "BLEU",
    "rougeL": "ROUGE-L",
    "rouge2": "ROUGE-2",
    "chrf": "chrF",
    "distinct2": "distinct-2",
    "repeated_4grams": "repeated 4-grams",
    "length_ratio": "length ratio",
}
CHECKPOINTS = {"last": "final", "best": "best on validation"}
Lines = list[dict[str, Any]]


@dataclass
class Compared:
    """Everything about one task that a report says."""

    task: Task
    run_with: Settings
    start: Result
    finals: Mapping[str, Sequence[Result]]  # by method, a result a seed
    settings: Mapping[str, Setting]
    tuning: Mapping[str, Mapping[Setting, Result]]

    @cached_property
    def references(self) -> list[tuple[str, ...]]:
        """Of each test source."""
        return [pair.references for pair in self.task.test_pairs(self.run_with)]

    @cached_property
    def counts(self) -> np.ndarray:
        """The draws of test sources that every system is resampled on."""
        return draw_counts(len(self.references))

    @cached_property
    def start_scores(self) -> Scores:
        """The warm start's on test, resampled."""
        return resampled(self.start["test"]["online"]["last"], self.references, self.counts)

    @cached_property
    def variants(self) -> dict[str, str]:
        """By method, which of its weights the tables show."""
        return {name: better_variant(results) for name, results in self.finals.items()}

    def label(self, method: str) -> str:
        averaged = self.variants[method] == "average" and method != "lmdqn"
        return METHODS[method].title + (" (averaged weights)" if averaged else "")

    def curves(self, method: str) -> list[list[dict[str, float]]]:
        """A validation curve a seed, the warm start its first point."""
        first = self.start["curves"]["online"]
        return [first + result["curves"][self.variants[method]] for result in self.finals[method]]


def mean_and_spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def as_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
