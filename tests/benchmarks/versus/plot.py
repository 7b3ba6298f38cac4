"""Validation reward against seconds and against episodes sampled, a line a system, a band for its seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lmdqn.errors import UserError

Curve = Sequence[Mapping[str, float]]


def plot_curves(curves: Mapping[str, Sequence[Curve]], title: str, file: Path) -> None:
    """Draw every system's curves (one a seed); the band reaches from the worst to the best seed.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed: pip install -c constraints.txt -e '.[bench]'") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, key, label in zip(panels, ("seconds", "episodes"), ("seconds of learning", "episodes"), strict=True):
        for system, of_seeds in curves.items():
            x, low, mean, high = _band(of_seeds, key)
            (line,) = panel.plot(x, mean, label=system)
            panel.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation reward")
    panels[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def _band(curves: Sequence[Curve], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, and lowest, mean and highest reward of the seeds there, as far as every seed goes."""
    x = np.linspace(0, min(curve[-1][key] for curve in curves), 1 + max(len(curve) for curve in curves) * 4)
    y = np.array([np.interp(x, [p[key] for p in curve], [p["reward"] for p in curve]) for curve in curves])
    return x, y.min(axis=0), y.mean(axis=0), y.max(axis=0)
