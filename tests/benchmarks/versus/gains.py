"""How much of the warm start's score each method gained, how soon, and at what cost to metrics nobody rewarded."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from versus.bootstrap import Scores, interval
from versus.compared import CHECKPOINTS, COLUMNS, Compared, Lines, as_table, mean_and_spread

REWARDED = "reward"
# not rewarded by the shipped recipe: by how much does a number count as worse than another?
WORSE = {
    "rouge2": lambda ours, start: start - ours,
    "chrf": lambda ours, start: start - ours,
    "distinct2": lambda ours, start: start - ours,
    "repeated_4grams": lambda ours, start: ours - start,
    "length_ratio": lambda ours, start: abs(ours - 100) - abs(start - 100),
}


def gains_table(one: Compared) -> tuple[str, Lines]:
    """Gains of the reward on test; on validation, when lmdqn passes a method and what each lost at the end."""
    rows, lines = [], []
    ours = (
        {checkpoint: fmean(_gains(one, "lmdqn", checkpoint)) for checkpoint in CHECKPOINTS}
        if "lmdqn" in one.finals
        else {}
    )
    for method in one.finals:
        gains = {checkpoint: _gains(one, method, checkpoint) for checkpoint in CHECKPOINTS}
        passed = _seconds_to_pass(one, method) if ours and method != "lmdqn" else []
        lost = [max(p[REWARDED] for p in curve) - curve[-1][REWARDED] for curve in one.curves(method)]
        harmed = _harmed(one, method)
        ratios = [_ratio(ours[c], fmean(gains[c])) if passed else "" for c in CHECKPOINTS]
        rows.append([
            one.label(method), *(mean_and_spread(of_each) for of_each in gains.values()), *ratios,
            ", ".join("never" if s is None else f"{s:.0f}" for s in passed), mean_and_spread(lost),
            ", ".join(COLUMNS[metric] for metric in harmed) or "none",
        ])  # fmt: skip
        lines.append({"table": "gains", "system": one.label(method), **gains, "seconds_to_pass": passed,
                      "lost_at_the_end": lost, "harmed": harmed})  # fmt: skip
    columns = [
        "system", *(f"gain, {title}" for title in CHECKPOINTS.values()),
        *(f"lmdqn's over it, {title}" for title in CHECKPOINTS.values()),
        "lmdqn passes its final score, s", "final below its best", "harmed",
    ]  # fmt: skip
    note = (
        "\nGains of the reward over the warm start on test. By validation: the second, of "
        f"{one.run_with.seconds:g}, at which each of lmdqn's seeds passes the method's mean final score, and how far a "
        "final score lies below its run's best. Harmed: what was not rewarded and is, by the mean of the final "
        "weights, worse than the warm start's by more than half its interval.\n"
    )
    return f"\n## Gains\n{note}\n" + as_table(columns, rows), lines


def _gains(one: Compared, method: str, checkpoint: str) -> list[float]:
    """On test, a seed each."""
    start = one.start["test"]["online"]["last"]["metrics"][REWARDED]
    variant = one.variants[method]
    return [result["test"][variant][checkpoint]["metrics"][REWARDED] - start for result in one.finals[method]]


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.1f}" if theirs > 0 else "it gained nothing"


def _seconds_to_pass(one: Compared, method: str) -> list[float | None]:
    """When each of lmdqn's curves, linear between its points, first reaches the method's mean final validation."""
    final = fmean(curve[-1][REWARDED] for curve in one.curves(method))
    return [first_reaches(curve, final) for curve in one.curves("lmdqn")]


def first_reaches(curve: Sequence[dict[str, float]], score: float) -> float | None:
    """The second at which a validation curve first has a score; None where it never has."""
    before = curve[0]
    for point in curve:
        if point[REWARDED] >= score:
            span = [before[REWARDED], point[REWARDED]]
            return float(np.interp(score, span, [before["seconds"], point["seconds"]]))
        before = point
    return None


def _harmed(one: Compared, method: str) -> list[str]:
    start: Scores = one.start_scores
    results = one.finals[method]
    found = []
    for metric, worse in WORSE.items():
        low, high = interval(start[metric])
        ended = fmean(result["test"][one.variants[method]]["last"]["metrics"][metric] for result in results)
        if worse(ended, float(start[metric][0])) > (high - low) / 2:
            found.append(metric)
    return found
