"""The report as a file: what it says, that all of it is inert text, and that nothing is fetched."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmdqn.recipe import BETTER_IF_GREATER, QLearningSection
from lmdqn.results.browser import browser_content
from lmdqn.results.calibration import Calibration
from lmdqn.results.evaluate import Evaluation
from lmdqn.results.plots import Series, interval_chart, line_chart
from lmdqn.results.report import write_report
from lmdqn.results.tables import COLUMNS, p_text
from tests.conftest import HOSTILE, SOURCES, Ran


@pytest.fixture
def run(finished_run: Callable[..., Path]) -> Path:
    return finished_run("run", SOURCES)


def page_of(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_the_table_shows_results_intervals_gains_and_p(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    text = text_of(page_of(run))
    for phase in ("start", "mle", "dqn"):
        low, high = results["interval"][phase]["bleu"]
        assert f"{results['test'][phase]['bleu']:.1f} {low:.1f} – {high:.1f}" in text
    gain = results["test"]["dqn"]["rougeL"] - results["test"]["mle"]["rougeL"]
    assert f"{gain:+.1f} {results['p_value']['rougeL']:.3f}" in text
    assert "The kept model is that of step 10" in text  # 50 + 10 * 20 against 50 + 20 * 10 at a later step
    assert "Constant throughout: loss 2, beta 0.004." in text
    assert "MLE 61 s" in text
    assert "DQN 2.0 min" in text
    assert "2.0 h" in text
    assert f"peak memory {results['peak_memory_mib']['resident']:,.0f} MiB resident" in text
    assert "Nothing was recorded: no update was made" in text


def test_a_run_from_a_log_sampled_what_its_rounds_did(finished_run: Callable[..., Path]) -> None:
    """20 steps, a rollout of 16 prompts and 8 samples after every six, two at most; without rounds none."""
    for rounds, sampled in ((0, "0"), (2, "256")):
        offline = {"path": "log.jsonl", "rounds": rounds, "steps_per_round": 6}
        run = finished_run(f"run{rounds}", SOURCES, offline=offline, replay={"fresh_share": 0.5})
        assert f"20 steps, {sampled} sampled episodes" in text_of(page_of(run))


@pytest.mark.parametrize("metric", BETTER_IF_GREATER)
def test_whichever_metric_chose_the_model(finished_run: Callable[..., Path], metric: str) -> None:
    run = finished_run("run", SOURCES, evaluation={"metric": metric})
    lines = (run / "metrics.jsonl").read_text().replace("validation_reward", f"validation_{metric}")
    (run / "metrics.jsonl").write_text(lines)
    assert f"{COLUMNS[metric]} went from" in text_of(page_of(run))


def test_the_smallest_p_is_below_the_thousandth_that_it_rounds_to(finished_run: Callable[..., Path]) -> None:
    """1/1001, of a gain in all of 1,000 resamples."""
    results = json.loads((finished_run("run", SOURCES, samples=1000) / "results.json").read_text())
    assert results["p_value"]["rougeL"] == pytest.approx(1 / 1001, rel=1e-5)
    assert p_text(results["p_value"]["rougeL"]) == "< .001"


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("predictions.jsonl", None, "cannot read {}: No such file or directory"),
        ("metrics.jsonl", '{"phase": "mle", "step": 1}\n{"phase": "m', "{}, line 2: not valid JSON"),
        ("results.json", "{", "{}: not valid JSON"),
    ],
)
def test_a_damaged_file_is_named(
    command_line: Callable[..., Ran], run: Path, file: str, text: str | None, told: str
) -> None:
    (run / file).unlink()
    if text is not None:
        (run / file).write_text(text, encoding="utf-8")
    ran = command_line("report", run)
    assert ran.code == 2
    assert ran.err.startswith(f"lmdqn: {told.format(run / file)}")


def test_nothing_better_than_the_start_is_said(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]))
    assert "No validation was better than the one before Q-learning (50.0): that model is kept." in text_of(
        page_of(run)
    )


def test_every_number_that_moved_has_its_curve(run: Path) -> None:
    titles = re.findall(r'role="img" aria-label="([^"]+)"', page_of(run))
    assert titles == ["reward", "reward of samples", "loss"]


def test_calibration_is_drawn_where_it_was_recorded(run: Path) -> None:
    kept = Calibration(QLearningSection())
    value = torch.linspace(-1, 1, 40)
    step, tokens = torch.full((40,), 7.0), torch.full((40,), 10.0)
    episode, position = torch.arange(4).repeat_interleave(10), torch.arange(10).repeat(4)
    rows = torch.stack([step, episode, position, tokens, value, 2 * value], dim=1)
    kept.restore({"rollouts": [rows], "episodes": 4})
    kept.save(run / "calibration.parquet")
    page = page_of(run)
    assert 'aria-label="realised return by predicted value"' in page
    assert "40 states of 4 responses, rollouts 7 to 7" in text_of(page)
    assert "V explains 0.75 of the variance of the return; rank correlation 1.00" in text_of(page)


def test_the_page_is_one_file_and_text_stays_text(run: Path) -> None:
    page = page_of(run)
    assert HOSTILE not in page
    assert "<img" not in page
    assert page.count("<script") == 2  # the data, and our own
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", re.sub(r"<svg.*?</svg>", "", page, flags=re.S))
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        assert not re.findall(r'href="(?!#)', svg)
    data = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert data
    samples = json.loads(data.group(1))["samples"]
    assert [sample["source"] for sample in samples] == list(SOURCES)
    assert samples[2]["responses"][2] == HOSTILE


def test_a_name_with_markup_is_escaped_in_text_and_drawings() -> None:
    chart = line_chart("<b>&", [Series("<i>", [1, 2], [3, 4])], "$x<$")
    assert "<b>" not in chart.svg
    assert "<i>" not in interval_chart("t", [("<i>$", 1.0, (0.0, 2.0), "dqn")]).svg


def test_too_much_text_is_thinned_evenly() -> None:
    system = Evaluation(["y" * 1000] * 5, {}, {"reward": [0.1, 0.2, 0.3, 0.4, 0.5]})
    lines = [{"source": "x" * 999_000, "references": []} for _ in range(5)]
    content = browser_content(lines, {"a": system, "b": system}, {"a": ("A", "mle"), "b": ("B", "dqn")}, "a", "b")
    assert [sample["number"] for sample in content["data"]["samples"]] == [1, 3, 5]
    assert content["shown"] == "3 of 5, evenly spaced"


def test_the_command_writes_where_it_is_told(command_line: Callable[..., Ran], run: Path, tmp_path: Path) -> None:
    done = command_line("report", run, "--output", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert done.out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    done = command_line("report", run, "--output", tmp_path / "missing" / "page.html")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "cannot write" in done.err


def test_what_is_no_finished_run_is_refused(command_line: Callable[..., Ran], run: Path, tmp_path: Path) -> None:
    (run / "results.json").unlink()
    for folder, reason in ((tmp_path, "no run of lmdqn"), (run, "has not ended")):
        done = command_line("report", folder)
        assert done.code == 2
        assert reason in done.err
