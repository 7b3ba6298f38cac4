"""Runs beside each other: the same test sources, every metric, paired significance against the first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from lmdqn.errors import UserError
from lmdqn.recipe import BETTER_IF_GREATER, METRICS, RewardSection, load_recipe
from lmdqn.results.browser import browser_content
from lmdqn.results.evaluate import Evaluation
from lmdqn.results.page import render
from lmdqn.results.plots import Chart, interval_chart
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.significance import SIGNIFICANT, Kind, Significance, paired_significance
from lmdqn.results.tables import COLUMNS, p_text, signed
from lmdqn.whole_files import write_whole

INKS = ("start", "dqn", "mle", "more", "ink", "soft")


@dataclass
class Comparison:
    """What several runs answered to the same sources; the first is the baseline."""

    runs: dict[str, Evaluation]  # by name, in the order they were given
    significance: Significance
    metric: str  # what decides
    kind: Kind
    lines: Sequence[Mapping[str, Any]]  # the baseline's predictions.jsonl
    note: str  # what could not be compared, or nothing

    @property
    def baseline(self) -> str:
        return next(iter(self.runs))

    @property
    def gained(self) -> bool:
        """Is the last run better than the first by the deciding metric, with p < .05?"""
        last = list(self.runs)[-1]
        gain = self.runs[last].metrics[self.metric] - self.runs[self.baseline].metrics[self.metric]
        return gain > 0 and self.significance.p_value[last][self.metric] < SIGNIFICANT


def compare_runs(
    runs: Sequence[str | Path],
    metric: str | None = None,
    kind: Kind = "bootstrap",
    samples: int = 1000,
    task: str | None = None,
) -> Comparison:
    """Test each run's DQN responses against the first run's.

    `metric` decides; when not given it is the first run's evaluation.metric. Runs with different rewards are compared
    by all else. Of runs with several tasks `task` names the one; other runs are taken whole.

    Raises:
        UserError: fewer than two runs, one that has not ended, other test sources or references, or a deciding metric
            that these runs do not share.
    """
    if len(runs) < 2:
        raise UserError("compare needs two runs or more")
    folders = {_name(run, runs): RunFolder(Path(run)) for run in runs}
    if len(folders) < len(runs):
        raise UserError("compare was given the same run twice")
    read = [_read(folder, task) for folder in folders.values()]
    if task is not None and not any(one.task for one in read):
        raise UserError(f"--task {task}: these runs have one task each, which has no name")
    for folder, one in zip(folders.values(), read, strict=True):
        _check_same_test(next(iter(folders.values())), read[0].lines, folder, one.lines)
    evaluations = {name: one.evaluation for name, one in zip(folders, read, strict=True)}
    lines, metric = read[0].lines, metric or read[0].metric
    note = ""
    if any(one.reward != read[0].reward for one in read):
        note = "the runs' rewards differ, so they are not compared by reward"
        for evaluation in evaluations.values():
            del evaluation.metrics["reward"], evaluation.per_response["reward"]
    _check_metric(metric, evaluations, note)
    references = [line["references"] for line in lines]
    significance = paired_significance(evaluations, next(iter(evaluations)), references, samples, kind)
    return Comparison(evaluations, significance, metric, kind, lines, note)


class _Read(NamedTuple):
    """What is compared of a run."""

    task: str  # "" where it has but one
    reward: RewardSection
    metric: str  # its evaluation.metric
    evaluation: Evaluation  # of its DQN responses
    lines: list[dict[str, Any]]  # its predictions.jsonl


def _read(folder: RunFolder, task: str | None) -> _Read:
    """A run that has ended, or one of its several tasks."""
    folder.read_results()
    recipe = load_recipe(folder.recipe)
    name = "" if recipe.tasks is None else task or ""
    reward = (recipe.for_task(name) if name else recipe).only_task.reward
    evaluation, lines = folder.read_evaluation("dqn", name), folder.read_predictions(name)
    return _Read(name, reward, recipe.evaluation.metric, evaluation, lines)


def comparison_table(comparison: Comparison) -> Table:
    """A row a metric, a column a run: value and interval, gain over the first run, p."""
    table = Table("", title=_title(comparison))
    for name in comparison.runs:
        table.add_column(name, justify="right")
    for row in _rows(comparison):
        cells = [" ".join(c[part] for part in ("value", "interval", "gain", "p") if c.get(part)) for c in row["cells"]]
        table.add_row(row["name"], *cells, style="bold" if row["chosen"] else "")
    return table


def write_comparison(comparison: Comparison, file: Path) -> None:
    """The same as a page, with plots of the intervals and the responses side by side."""
    labels = {name: (name, ink) for name, ink in zip(comparison.runs, _inks(comparison), strict=True)}
    last = list(comparison.runs)[-1]
    page = render(
        "compare.html.j2",
        title=f"{last} against {comparison.baseline}",
        version=version("lmdqn"),
        summary=_title(comparison),
        note=comparison.note,
        labels=labels,
        rows=_rows(comparison),
        charts=_charts(comparison),
        browser=browser_content(comparison.lines, comparison.runs, labels, comparison.baseline, last),
    )
    write_whole(file, page)


def _name(run: str | Path, runs: Sequence[str | Path]) -> str:
    """The folder's name, or its whole path where two folders share a name."""
    path = Path(run)
    return path.name if [Path(other).name for other in runs].count(path.name) == 1 else str(path)


def _check_same_test(
    first: RunFolder, lines: Sequence[Mapping[str, Any]], other: RunFolder, others: Sequence[Mapping[str, Any]]
) -> None:
    if len(lines) != len(others):
        sizes = f"{first.path} on {len(lines)} examples and {other.path} on {len(others)}"
        raise UserError(f"a paired comparison needs the same test examples: {sizes}")
    for number, (line, its) in enumerate(zip(lines, others, strict=True), start=1):
        for part in ("source", "references"):
            if line[part] != its[part]:
                where = f"the {part} in line {number} of {first.predictions} and of {other.predictions} differ"
                raise UserError(f"a paired comparison needs the same test examples: {where}")


def _check_metric(metric: str, evaluations: Mapping[str, Evaluation], note: str) -> None:
    if metric not in BETTER_IF_GREATER:
        known = "it is no gain by itself" if metric in METRICS else "there is no such metric"
        raise UserError(f"--metric {metric}: {known}; choose one of {', '.join(BETTER_IF_GREATER)}")
    if any(metric not in evaluation.metrics for evaluation in evaluations.values()):
        raise UserError(f"--metric {metric}: {note or 'these test examples have no references'}; choose another")


def _title(comparison: Comparison) -> str:
    test = {"bootstrap": "paired bootstrap", "randomisation": "approximate randomisation"}[comparison.kind]
    return f"{len(comparison.lines)} test examples; gain and p against {comparison.baseline}, {test}"


def _rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Of every metric that all runs have: a cell a run, as texts."""
    shared = [name for name in COLUMNS if all(name in run.metrics for run in comparison.runs.values())]
    return [
        {
            "name": COLUMNS[metric],
            "chosen": metric == comparison.metric,
            "cells": [_cell(comparison, name, metric) for name in comparison.runs],
        }
        for metric in shared
    ]


def _cell(comparison: Comparison, name: str, metric: str) -> dict[str, str]:
    value = comparison.runs[name].metrics[metric]
    ends = comparison.significance.interval[name].get(metric)
    cell = {"tone": "", "value": f"{value:.1f}", "interval": f"[{ends[0]:z.1f}, {ends[1]:z.1f}]" if ends else ""}
    if name != comparison.baseline:
        p = comparison.significance.p_value[name].get(metric)
        gain = value - comparison.runs[comparison.baseline].metrics[metric]
        cell |= {"gain": signed(gain), "p": "" if p is None else f"p {p_text(p)}"}
        if p is not None and p < SIGNIFICANT and metric in BETTER_IF_GREATER:
            cell["tone"] = "good" if gain > 0 else "bad"
    return cell


def _charts(comparison: Comparison) -> list[Chart]:
    charts = []
    for metric, title in COLUMNS.items():
        rows = [
            (name, run.metrics[metric], comparison.significance.interval[name][metric], ink)
            for (name, run), ink in zip(comparison.runs.items(), _inks(comparison), strict=True)
            if metric in comparison.significance.interval[name]
        ]
        if rows:
            charts.append(interval_chart(title, rows))
    return charts


def _inks(comparison: Comparison) -> list[str]:
    return [INKS[i % len(INKS)] for i in range(len(comparison.runs))]
