"""Figures as PNG: any set of curves, pass@k, accuracy against tokens, reliability. Needs dqjax[plots]."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dqjax.config import ConfigError
from dqjax.eval.pass_at_k import pass_at_k_interval
from dqjax.eval.report import by_problem, counts
from dqjax.eval.run import Graded

POINTS = 200


class Curve(NamedTuple):
    """One line of a figure; `low` and `high` are drawn as a band round it."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def draw_curves(
    path: str | pathlib.Path,
    curves: Mapping[str, Curve],
    *,
    x: str,
    y: str,
    title: str = "",
    log_x: bool = False,
    shares: bool = False,
) -> pathlib.Path:
    """Draws named curves over one pair of axes and writes a PNG.

    Args:
      x, y: labels of the axes. log_x: powers of two. shares: y runs from 0 to 1, shown as percent.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter, ScalarFormatter
    except ImportError:
        raise ConfigError("plots need an extra package: pip install 'dqjax[plots]'") from None
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        (line,) = axes.plot(curve.x, curve.y, marker="o" if len(curve.x) <= 20 else None, markersize=3, label=name)
        if curve.low is not None:
            axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if shares:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    if len(curves) > 1:
        axes.legend(frameon=False)
    path = pathlib.Path(path)
    figure.savefig(path)
    return path


def draw_evaluation(
    out: str | pathlib.Path, runs: Mapping[str, Sequence[Graded]], *, max_new_tokens: int, level: float = 0.95
) -> list[pathlib.Path]:
    """The figures of evaluations, one curve each: pass_at_k.png, accuracy_against_tokens.png."""
    out = pathlib.Path(out)
    return [
        draw_curves(
            out / "pass_at_k.png", {name: pass_at_k_curve(g, level) for name, g in runs.items()},
            x="k", y="pass@k", log_x=True, shares=True,
        ),
        draw_curves(
            out / "accuracy_against_tokens.png", {name: budget_curve(g, max_new_tokens) for name, g in runs.items()},
            x="tokens a sample may use", y="accuracy", shares=True,
        ),
    ]  # fmt: skip


def draw_reliability(path: str | pathlib.Path, confidence: Sequence[float], accuracy: Sequence[float]) -> pathlib.Path:
    """The reliability diagram of a reward model: how often it is right against how sure it was, a point a bin.

    Args:
      confidence, accuracy: means of each bin, in [0.5, 1] and [0, 1].

    Raises:
      ConfigError: matplotlib is not installed.
    """
    curves = {"as sure as right": Curve([0.5, 1.0], [0.5, 1.0]), "held-out pairs": Curve(confidence, accuracy)}
    x, y = "probability given to the preferred answer", "share of pairs that are right"
    return draw_curves(path, curves, x=x, y=y, shares=True)


def pass_at_k_curve(graded: Sequence[Graded], level: float) -> Curve:
    """pass@k for powers of two up to the fewest samples of a problem."""
    n, c = counts(by_problem(graded))
    ks = [2**i for i in range(int(n.min()).bit_length())]
    intervals = [pass_at_k_interval(n, c, k, level=level, resamples=500) for k in ks]
    return Curve(ks, [i.value for i in intervals], [i.low for i in intervals], [i.high for i in intervals])


def budget_curve(graded: Sequence[Graded], max_new_tokens: int) -> Curve:
    """Accuracy when a sample counts only if it is right within a budget, against the budget."""
    budgets = np.unique(np.linspace(0, max_new_tokens, POINTS).round())
    total = np.zeros(len(budgets))
    groups: list[Any] = by_problem(graded)
    for group in groups:
        right = np.sort([g.tokens for g in group if g.correct])
        total += np.searchsorted(right, budgets, side="right") / len(group)
    return Curve(budgets, total / len(groups))
