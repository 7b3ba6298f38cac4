"""Runs beside each other: who wins by what, exit codes, and pairs that cannot be compared."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lmdqn.results.compare import compare_runs, comparison_table
from tests.conftest import HOSTILE, SOURCES, Ran

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lamda", "mu"]
MANY = [f"the {word} stood by the {other}" for word, other in zip(WORDS, WORDS[::-1], strict=True)]
POOR = [f"a {word}" for word in WORDS]
Make = Callable[..., Path]


@pytest.fixture
def pair(finished_run: Make) -> tuple[Path, Path]:
    return finished_run("poor", POOR, MANY), finished_run("good", MANY, MANY)


def test_exit_codes_say_who_is_better(command_line: Callable[..., Ran], pair: tuple[Path, Path]) -> None:
    poor, good = pair
    assert command_line("compare", poor, good).code == 0
    assert command_line("compare", good, poor).code == 1
    assert command_line("compare", poor, good, "--metric", "chrf", "--test", "randomisation").code == 0
    again = command_line("compare", poor, good, poor)
    assert again.code == 2
    assert "the same run twice" in again.err
    assert command_line("compare", poor).code == 2


def test_the_table_holds_every_metric_of_every_run(pair: tuple[Path, Path]) -> None:
    comparison = compare_runs(pair)
    assert comparison.gained
    assert comparison.runs["good"].metrics["rougeL"] == 100
    assert comparison.significance.p_value["good"]["rougeL"] == pytest.approx(1 / 1001)
    table = comparison_table(comparison)
    assert [str(column.header) for column in table.columns] == ["", "poor", "good"]
    names, first, last = (list(column.cells) for column in table.columns)
    row = names.index("ROUGE-L")
    low, high = comparison.significance.interval["poor"]["rougeL"]
    value = comparison.runs["poor"].metrics["rougeL"]
    assert first[row] == f"{value:.1f} [{low:.1f}, {high:.1f}]"
    assert last[row] == f"100.0 [100.0, 100.0] {100 - value:+.1f} p < .001"


def test_runs_of_equal_responses_show_no_gain(finished_run: Make) -> None:
    comparison = compare_runs([finished_run("a", MANY, MANY), finished_run("b", MANY, MANY)])
    assert not comparison.gained
    assert set(comparison.significance.p_value["b"].values()) == {1.0}


def test_other_test_examples_are_a_clear_error(
    command_line: Callable[..., Ran], finished_run: Make, pair: tuple[Path, Path]
) -> None:
    shorter = finished_run("shorter", MANY[:3], MANY[:3])
    done = command_line("compare", pair[0], shorter)
    assert done.code == 2
    assert "on 12 examples and" in done.err
    other = finished_run("other", MANY, [*MANY[:2], "something else", *MANY[3:]])
    done = command_line("compare", pair[0], other)
    assert done.code == 2
    assert "the source in line 3 of" in done.err


def test_runs_of_other_rewards_are_compared_by_all_else(
    command_line: Callable[..., Ran], finished_run: Make, pair: tuple[Path, Path]
) -> None:
    other = finished_run("other", MANY, MANY, reward={"mix": {"chrf": 1.0}})
    done = command_line("compare", pair[0], other)
    assert done.code == 2
    assert "--metric reward: the runs' rewards differ" in done.err
    done = command_line("compare", pair[0], other, "--metric", "bleu")
    assert done.code == 0
    assert "not compared by reward" in done.out


@pytest.mark.parametrize(("metric", "reason"), [("length_words", "no gain by itself"), ("blue", "no such metric")])
def test_the_deciding_metric_must_be_one_that_more_of_is_better(
    command_line: Callable[..., Ran], pair: tuple[Path, Path], metric: str, reason: str
) -> None:
    done = command_line("compare", *pair, "--metric", metric)
    assert done.code == 2
    assert reason in done.err


def test_folders_of_one_name_are_told_apart_by_their_paths(finished_run: Make) -> None:
    runs = [finished_run("x/run", MANY, MANY), finished_run("y/run", MANY, MANY)]
    assert list(compare_runs(runs).runs) == [str(run) for run in runs]


def test_the_page_holds_the_plots_and_inert_responses(
    command_line: Callable[..., Ran], finished_run: Make, tmp_path: Path
) -> None:
    runs = finished_run("a", ["x"] * 4), finished_run("b", SOURCES)
    done = command_line("compare", *runs, "--output", tmp_path / "page.html")
    assert done.code in (0, 1), done.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 8
    assert "b against a" in page
    assert HOSTILE not in page
