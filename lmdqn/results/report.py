"""The report: a run's folder as one HTML page that a person reads from top to bottom."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

from lmdqn.recipe import METRICS, Recipe, TaskSection, dump_recipe, load_recipe
from lmdqn.results.browser import browser_content
from lmdqn.results.calibration import by_position, explained, rank_correlation, read_calibration, reliability
from lmdqn.results.model_card import set_name
from lmdqn.results.page import render
from lmdqn.results.plots import Chart, Series, line_chart, reliability_chart
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.significance import SIGNIFICANT
from lmdqn.results.tables import COLUMNS, PHASES, p_text, signed
from lmdqn.results.tracking import LOGGED
from lmdqn.whole_files import write_whole

NEUTRAL = ("length_words", "distinct2", "repeated_4grams")  # neither more nor less of them is a gain by itself
# Not curves; and ROUGE-Lsum, which is ROUGE-L wherever a response is one line
UNDRAWN = ("phase", "step", "seconds", "validation_rougeLsum")
TASK_INKS = ("mle", "more", "start", "soft")
Lines = Sequence[Mapping[str, Any]]
TITLES = {  # in the order of their charts; what else was logged comes after
    "reward": "reward of samples",
    "kl_nats": "KL to the reference, nats",
    "value_explained": "return explained by V",
    "loss": "loss",
    "residual_nats": "mean |residual|, nats",
    "gradient_norm": "gradient norm",
    "response_tokens": "length of samples, tokens",
    "behaviour_nats": "entropy of the behaviour, nats",
    "repeated_4grams": "repeated 4-grams in samples",
    "truncated_share": "share cut at the length limit",
    "equal_groups_share": "share of groups without signal",
    "rate_factor": "learning rate over its peak",
    "episodes_per_s": "episodes a second",
    "replay_episodes": "episodes in the replay",
}


def write_report(run: str | Path, output: Path | None = None) -> Path:
    """Write the page of a run, to its own `report.html` unless said otherwise; gives the file.

    Raises:
        UserError: this is no run, it has not ended, or the file cannot be written.
    """
    folder = RunFolder(Path(run))
    results = folder.read_results()
    page = render("report.html.j2", **_content(folder, results, load_recipe(folder.recipe)))
    file = output or folder.report
    write_whole(file, page)
    return file


def _content(folder: RunFolder, results: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    predictions, lines = folder.read_predictions(), folder.read_metrics()
    phases = {phase: PHASES[phase] for phase in results["test"]}
    before = "mle" if "mle" in phases else "start"
    systems = {phase: folder.read_evaluation(phase) for phase in phases}
    return {
        "title": f"{_model_name(recipe)} on {_data_name(recipe)}",
        "version": version("lmdqn"),
        "verdict": _verdict(results, before, recipe.evaluation.metric, len(predictions)),
        "kept": kept_step(lines, recipe.evaluation.metric),
        "facts": _facts(results, lines, recipe),
        "phases": phases,
        "before": PHASES[before],
        "tables": _tables(folder, recipe, before),
        "several": recipe.tasks is not None,
        "samples": recipe.evaluation.bootstrap_samples,
        "mix": "; ".join(f"{name}: {_mix(task)}" if name else _mix(task) for name, task in recipe.every_task.items()),
        "curves": _curves(lines, recipe),
        "calibration": _calibration(folder, recipe),
        "no_calibration": "a path loss trains no value head"
        if recipe.qlearning.loss == "path"
        else "no update was made",
        "browser": browser_content(predictions, systems, {p: (phases[p], p) for p in phases}, before, "dqn"),
        "ran": _ran(results),
        "recipe": dump_recipe(recipe),
        "recipe_file": folder.recipe,
    }


def _model_name(recipe: Recipe) -> str:
    if recipe.model.from_scratch is not None:
        return f"{recipe.model.from_scratch.family} from scratch"
    name = Path(recipe.model.name or "").name
    return f"{name} with LoRA" if recipe.model.lora else name


def _data_name(recipe: Recipe) -> str:
    return ", ".join(name or set_name(task.data) for name, task in recipe.every_task.items())


def _mix(task: TaskSection) -> str:
    return ", ".join(f"{weight:g} {name}" for name, weight in task.reward.mix.items())


def _tables(folder: RunFolder, recipe: Recipe, before: str) -> list[dict[str, Any]]:
    """The table of the whole run, and one of each of several tasks."""
    tables = []
    for task in ("", *(recipe.tasks or ())):
        results = folder.read_results(task)
        title = task or ("Mean over the tasks" if recipe.tasks else "")
        rows = [_row(name, results, before, recipe) for name in COLUMNS if name in results["test"]["dqn"]]
        tables.append({"title": title, "examples": len(folder.read_predictions(task)), "rows": rows})
    return tables


def _verdict(results: Mapping[str, Any], before: str, metric: str, examples: int) -> str:
    old, new = results["test"][before][metric], results["test"]["dqn"][metric]
    p = results["p_value"].get(metric)
    sure = signed(new - old) if p is None else f"{signed(new - old)}, p {p_text(p)}"
    moved = f"{COLUMNS[metric]} went from {old:.1f} to {new:.1f} ({sure})"
    return f"From {PHASES[before]} to DQN, {moved} on {examples} test examples."


def kept_step(lines: Lines, metric: str) -> str:
    """Which step's model is kept, in a sentence."""
    scores = [(line[f"validation_{metric}"], line["step"]) for line in lines if f"validation_{metric}" in line]
    best, step = max(scores, key=lambda score: score[0])
    if step == 0:
        return f"No validation was better than the one before Q-learning ({best:.1f}): that model is kept."
    return f"The kept model is that of step {step}, the best on validation."


def _facts(results: Mapping[str, Any], lines: Lines, recipe: Recipe) -> str:
    steps = max((line["step"] for line in lines if line["phase"] == "dqn"), default=0)
    rollouts = recipe.offline.rollouts_after(steps) if recipe.offline else steps
    episodes = rollouts * recipe.rollout.prompts * recipe.rollout.samples
    took = _minutes(results["seconds"]["dqn"])
    return f"{steps} steps, {episodes:,} sampled episodes, {took} of Q-learning; seed {recipe.seed}."


def _row(name: str, results: Mapping[str, Any], before: str, recipe: Recipe) -> dict[str, Any]:
    """A metric's line of the table."""
    test, p = results["test"], results["p_value"].get(name)
    gain = test["dqn"][name] - test[before][name]
    intervals = {phase: results["interval"][phase].get(name) for phase in test}
    tone = ""
    if p is not None and p < SIGNIFICANT and name not in NEUTRAL:
        tone = "good" if gain > 0 else "bad"
    return {
        "name": COLUMNS[name],
        "chosen": name == recipe.evaluation.metric,
        "value": {phase: f"{test[phase][name]:.1f}" for phase in test},
        "interval": {phase: f"{ends[0]:z.1f} – {ends[1]:z.1f}" if ends else "" for phase, ends in intervals.items()},
        "gain": signed(gain),
        "tone": tone,
        "p": "" if p is None else p_text(p).removeprefix("= "),
    }


def _curves(lines: Lines, recipe: Recipe) -> list[dict[str, Any]]:
    """Sections of charts, one for each number that was logged and moved."""
    metric = recipe.evaluation.metric
    dqn = [line for line in lines if line["phase"] == "dqn"]
    mle = [line for line in lines if line["phase"] == "mle"]
    validation = [line for line in dqn if f"validation_{metric}" in line]
    kept = f"Greedy responses of the target network; model/ keeps the one whose {COLUMNS[metric]} was best."
    sections = [
        _section("Validation", kept, validation, "dqn", "validation_", metric, list(recipe.tasks or ())),
        _section("Q-learning", "Each point is a logged step. Tap a title for what it means.", dqn, "dqn", "", metric),
        _section("Warm start (MLE)", "Supervised learning of the references, before DQN.", mle, "mle", "", metric),
    ]
    sections[1]["constant"].append(f"beta {recipe.qlearning.beta:g}")
    return [section for section in sections if section["charts"]]


def _section(
    title: str, note: str, lines: Lines, ink: str, prefix: str, metric: str, tasks: Sequence[str] = ()
) -> dict[str, Any]:
    """Charts of the keys that begin with `prefix`; with it, each metric's has a line for each of several tasks."""
    charts, constant = [], []
    of_tasks = {f"{prefix}{task}_{name}" for task in tasks for name in METRICS}
    logged = dict.fromkeys(key for line in lines for key in line)
    for name in dict.fromkeys([*(key for key in TITLES if key in logged), *logged]):
        skipped = name in UNDRAWN or name.startswith("reward_")
        if skipped or name.startswith("validation_") != bool(prefix) or name in of_tasks:
            continue
        points = _points(lines, name)
        label = COLUMNS.get(name.removeprefix(prefix), name.removeprefix(prefix)) if prefix else TITLES.get(name, name)
        if len({y for _, y in points}) < 2:
            constant += [f"{label} {y:g}" for _, y in points[:1]]
            continue
        series = [_series(label, points, ink)]
        if name == f"validation_{metric}":
            best = max(points, key=lambda point: point[1])
            series.append(Series("kept", [best[0]], [best[1]], "ink"))
        for task, its_ink in zip(tasks, cycle(TASK_INKS), strict=False):
            if its_points := _points(lines, f"{prefix}{task}_{name.removeprefix(prefix)}"):
                series.append(_series(task, its_points, its_ink))
        charts.append(line_chart(label, series, "rollouts" if ink == "dqn" else "updates", LOGGED.get(name, "")))
    keys = [key for key in dict.fromkeys(key for line in lines for key in line) if key.startswith("reward_")]
    by_task = [key for key in keys if key.startswith("reward_of_")]
    by_term = [key for key in keys if key not in by_task]
    for title_of, start, which in (
        ("terms of the reward", "reward_", by_term),
        ("reward of samples by task", "reward_of_", by_task),
    ):
        if len(which) > 1 and not prefix:
            inks = ("dqn", "mle", "more", "start", "ink")
            parts = [
                _series(key.removeprefix(start), _points(lines, key), ink)
                for key, ink in zip(which, inks, strict=False)
            ]
            meaning = LOGGED["reward_<term>" if start == "reward_" else "reward_of_<task>"]
            charts.append(line_chart(title_of, parts, "rollouts", meaning))
    return {"title": title, "note": note, "charts": charts, "constant": constant}


def _points(lines: Lines, name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if name in line and math.isfinite(line[name])]


def _series(name: str, points: Sequence[tuple[float, float]], ink: str) -> Series:
    return Series(name, [x for x, _ in points], [y for _, y in points], ink)


def _calibration(folder: RunFolder, recipe: Recipe) -> dict[str, Any] | None:
    if not folder.calibration.exists():
        return None
    columns = read_calibration(folder.calibration)
    values, realised = columns["value"], columns["realised"]
    share, correlation = explained(values, realised), rank_correlation(values, realised)
    first, last = int(columns["step"].min()), int(columns["step"].max())
    seen = ""
    if recipe.qlearning.has_value_head and recipe.qlearning.value_sees_references:
        seen = (
            "; in training the value head also sees how the prefix matches the references and how the prompt's other "
            "samples fared"
        )
    note = (
        f"What V said of freshly sampled states before any update on them, against the centred return that then came: "
        f"{len(values):,} states of {len(set(columns['episode'])):,} responses, rollouts {first} to {last}{seen}. "
        f"V explains {share:.2f} of the variance of the return; rank correlation {correlation:.2f}."
    )
    positions = by_position(columns)
    x = [100 * middle for middle, _, _ in positions]
    charts: list[Chart] = [
        reliability_chart(
            "realised return by predicted value",
            reliability(values, realised),
            "Tenths of the states by V, bars two standard errors; on the dashed diagonal V would be right on average.",
        ),
        line_chart(
            "agreement by position in the response",
            [
                Series("rank correlation", x, [rank for _, rank, _ in positions], "dqn"),
                Series("explained share", x, [part for _, _, part in positions], "mle"),
            ],
            "position, % of the response",
            "Spearman's correlation of V and the realised return G, and 1 - var(G - V) / var(G), by tenths.",
            zero=True,
        ),
    ]
    return {"note": note, "charts": charts}


def _ran(results: Mapping[str, Any]) -> dict[str, str]:
    seconds, environment = results["seconds"], results["environment"]
    phases = {PHASES[name]: _minutes(took) for name, took in seconds.items() if name in PHASES}
    took = {**phases, "in all, evaluation and loading included": _minutes(seconds["total"])}
    if "peak_memory_mib" in results:
        took["peak memory"] = ", ".join(f"{mib:,.0f} MiB {where}" for where, mib in results["peak_memory_mib"].items())
    return took | environment


def _minutes(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
