"""The report: markdown for people, JSON lines for programs, both made anew from the units' results."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from statistics import fmean, stdev
from typing import Any

import numpy as np

from versus.arena import Settings, Task
from versus.bootstrap import Scores, interval, paired_p, resampled
from versus.compared import CHECKPOINTS, COLUMNS, Compared, Lines, as_table, mean_and_spread
from versus.gains import gains_table
from versus.plot import plot_curves
from versus.units import METHODS, best_validation

OF_THE_CLOCK = {"wall": "", "cpu": " (CPU time)"}
TESTED = ("reward", "bleu", "rougeL", "rouge2", "chrf")  # metrics with a p-value


def write_report(one: Compared) -> None:
    """`report.md`, `table.jsonl` and `curves.png` in the task's folder."""
    text, lines = _heading(one.run_with, one.task), []
    for table, more in (_test_tables(one), gains_table(one), _equal_rollouts(one), _tuning_table(one)):
        text += table
        lines += [{"set": one.task.set, "architecture": one.task.architecture, **line} for line in more]
    folder = one.task.folder(one.run_with)
    plot_curves({one.label(method): one.curves(method) for method in one.finals}, str(one.task), folder / "curves.png")
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _heading(settings: Settings, task: Task) -> str:
    overrides = " ".join(settings.overrides) or "none"
    return (
        f"# {task}: lmdqn against TRL, {settings.seconds:g} s of learning{OF_THE_CLOCK[settings.clock]} a run\n\n"
        "Test: mean over seeds ± standard deviation over seeds; the warm start with its 95 % bootstrap interval. "
        "Differences: lmdqn minus the method, both at their final or both at their best checkpoint, p by paired "
        "bootstrap over test sources on the scores' mean over seeds. All 0 to 100; length ratio 100 is the references' "
        f"length. {_versions()}, {settings.threads} thread(s). Overrides of the recipe: {overrides}.\n"
    )


def _versions() -> str:
    names = [name for name in ("lmdqn", "torch", "transformers", "trl") if find_spec(name)]
    return ", ".join(f"{name} {version(name)}" for name in names)


def _test_tables(one: Compared) -> tuple[str, Lines]:
    references, counts, start = one.references, one.counts, one.start_scores
    rows = [["warm start", "", *(f"{start[m][0]:.1f} [{_interval(start[m])}]" for m in COLUMNS)]]
    lines: Lines = [_line("warm start", "", m, [float(start[m][0])], interval=interval(start[m])) for m in COLUMNS]
    means: dict[tuple[str, str], Scores] = {}  # by method and checkpoint, over seeds
    for method, results in one.finals.items():
        for checkpoint, title in CHECKPOINTS.items():
            variant = one.variants[method]
            seeds = [resampled(result["test"][variant][checkpoint], references, counts) for result in results]
            means[method, checkpoint] = {m: np.mean([scores[m] for scores in seeds], axis=0) for m in COLUMNS}
            observed = {m: [float(scores[m][0]) for scores in seeds] for m in COLUMNS}
            rows.append([one.label(method), title, *(mean_and_spread(observed[m]) for m in COLUMNS)])
            lines += [_line(one.label(method), title, m, observed[m]) for m in COLUMNS]
    seeds_run = len(next(iter(one.finals.values())))
    text = f"\n## Test, {len(references)} sources, {seeds_run} seeds\n\n"
    text += as_table(["system", "checkpoint", *COLUMNS.values()], rows)
    if "lmdqn" in one.finals:
        table, more = _differences(one, means)
        text, lines = text + table, lines + more
    return text, lines


def _differences(one: Compared, means: Mapping[tuple[str, str], Scores]) -> tuple[str, Lines]:
    rows, lines = [], []
    for (method, checkpoint), theirs in means.items():
        if method == "lmdqn":
            continue
        ours, title = means["lmdqn", checkpoint], CHECKPOINTS[checkpoint]
        cells = []
        for m in TESTED:
            gain, p = float(ours[m][0] - theirs[m][0]), paired_p(ours[m], theirs[m])
            cells.append(f"{gain:+.1f} (p {f'= {p:.3f}' if p >= 0.001 else '< .001'})")
            lines.append({"table": "difference", "against": one.label(method), "checkpoint": title, "metric": m,
                          "gain": gain, "p": p})  # fmt: skip
        rows.append([one.label(method), title, *cells])
    columns = ["lmdqn minus", "checkpoint", *(COLUMNS[m] for m in TESTED)]
    return "\n## Differences on test\n\n" + as_table(columns, rows), lines


def _equal_rollouts(one: Compared) -> tuple[str, Lines]:
    """Every system's validation curves, read (between points: linearly) at the rollouts that all of them reached."""
    ends = {method: fmean(curve[-1]["episodes"] for curve in one.curves(method)) for method in one.finals}
    equal = min(curve[-1]["episodes"] for method in one.finals for curve in one.curves(method))
    rows, lines = [], []
    for method in one.finals:
        at = {m: [_at(curve, equal, m) for curve in one.curves(method)] for m in COLUMNS}
        seconds = fmean(curve[-1]["seconds"] for curve in one.curves(method))
        rate = ends[method] / seconds
        rows.append([one.label(method), f"{ends[method]:.0f}", f"{rate:.1f}",
                     *(mean_and_spread(at[m]) for m in COLUMNS)])  # fmt: skip
        for m in COLUMNS:
            lines.append({"table": "equal rollouts", "system": one.label(method), "episodes": equal, "metric": m,
                          "mean": fmean(at[m]), "seeds": at[m], "episodes_in_all": ends[method]})  # fmt: skip
    title = f"\n## Validation at equal rollouts: {equal:.0f} episodes sampled\n\n"
    columns = ["system", "episodes in all", "episodes a second", *COLUMNS.values()]
    return title + as_table(columns, rows), lines


def _tuning_table(one: Compared) -> tuple[str, Lines]:
    """What was tried, and what was taken."""
    rows, lines = [], []
    for method, tried in one.tuning.items():
        for setting, result in tried.items():
            best = best_validation(result)
            last = max(curve[-1]["reward"] for curve in result["curves"].values())
            taken = setting == one.settings[method]
            rows.append([METHODS[method].title, str(setting), f"{best:.2f}", f"{last:.2f}", "taken" if taken else ""])
            lines.append({"table": "tuning", "method": method, "rate": setting.rate, "schedule": setting.schedule,
                          "best": best, "last": last, "taken": taken})  # fmt: skip
    if not rows:
        return "", []
    columns = ["method", "learning rate", "best validation reward", "final", ""]
    return "\n## Tuning, one seed that is not among those compared\n\n" + as_table(columns, rows), lines


def _at(curve: Sequence[Mapping[str, float]], episodes: float, metric: str) -> float:
    return float(np.interp(episodes, [point["episodes"] for point in curve], [point[metric] for point in curve]))


def _line(system: str, checkpoint: str, metric: str, seeds: Sequence[float], **more: Any) -> dict[str, Any]:
    spread = stdev(seeds) if len(seeds) > 1 else 0.0
    return {"table": "test", "system": system, "checkpoint": checkpoint, "metric": metric, "mean": fmean(seeds),
            "std": spread, "seeds": list(seeds), **more}  # fmt: skip


def _interval(values: np.ndarray) -> str:
    low, high = interval(values)
    return f"{low:.1f}, {high:.1f}"
