"""What an evaluation says: figures a mode, a table for people, files for programs."""

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dqjax.eval.pass_at_k import Interval, compare_pass_at_k, majority, mean_interval, pass_at_k, pass_at_k_interval
from dqjax.eval.run import Graded
from dqjax.rewards.extract import normalise

DISTINCT = 6  # difficulties of at most so many values are bins themselves; more are cut at quintiles

MODES = {True: "thinking on", False: "thinking off"}


def summarise(
    graded: Sequence[Graded],
    *,
    k: Sequence[int] = (1,),
    max_new_tokens: int,
    budgets: Sequence[int] = (),
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of one mode's samples, as JSON values.

    Means are over problems of the mean over their samples. Intervals are `[low, high]` at `level`.

        accuracy         pass@1
        pass_at_k        for each k that every problem has enough samples for
        majority         the most frequent answer of each problem's samples is right; from 3 samples a problem
        tokens           of a sample, thinking included; thinking_tokens: inside the think block
        at_budget        a sample counts if it is right within the budget; budgets are powers of two if none are given
        budget_area      ∫₀ᴮ accuracy(b) db / B = mean of correct · (1 − tokens/B), B = max_new_tokens
        by_difficulty    the bins, and Spearman's ρ of a problem's difficulty and its mean tokens
        tokens_per_correct, seconds_per_correct    all tokens and seconds over the number of right samples

    Raises:
      ValueError: no samples.
    """
    problems = by_problem(graded)
    if not problems:
        raise ValueError("no samples to report")
    n, c = counts(problems)
    tokens = np.array([g.tokens for g in graded])
    correct = np.array([g.correct for g in graded])
    usable = [j for j in k if j <= n.min()]
    bounds = dict(level=level, seed=seed)
    summary: dict[str, Any] = {
        "problems": len(problems),
        "samples": len(graded),
        "accuracy": _interval(pass_at_k_interval(n, c, 1, **bounds)),
        "pass_at_k": {str(j): _interval(pass_at_k_interval(n, c, j, **bounds)) for j in usable},
        "tokens": _spread(tokens),
        "thinking_tokens": _spread(np.array([g.thinking_tokens for g in graded])),
        "truncated": float(np.mean([g.truncated for g in graded])),
        "failed": dict(collections.Counter(_reason(g.failed) for g in graded if g.failed)),
        "at_budget": _at_budgets(problems, budgets or _powers(max_new_tokens)),
        "budget_area": _mean(problems, lambda g: g.correct * max(0.0, 1 - g.tokens / max_new_tokens)),
        "tokens_per_correct": float(tokens.sum() / correct.sum()) if correct.any() else None,
        "seconds_per_correct": float(sum(g.seconds for g in graded) / correct.sum()) if correct.any() else None,
    }
    if n.min() >= 3:
        votes = [majority([normalise(g.answer or "") for g in group], [g.correct for g in group]) for group in problems]
        summary["majority"] = _interval(mean_interval(np.array(votes, float), **bounds))
    if all(group[0].difficulty is not None for group in problems):
        summary["by_difficulty"] = _by_difficulty(problems)
    return summary


def by_problem(graded: Sequence[Graded]) -> list[list[Graded]]:
    """The samples of each problem together, in order of appearance."""
    groups: dict[str, list[Graded]] = {}
    for g in graded:
        groups.setdefault(g.id, []).append(g)
    return list(groups.values())


def counts(problems: Sequence[Sequence[Graded]]) -> tuple[np.ndarray, np.ndarray]:
    """(n, c): samples and correct samples of each problem."""
    return np.array([len(group) for group in problems]), np.array([sum(g.correct for g in group) for group in problems])


def compare(ours: Sequence[Graded], theirs: Sequence[Graded], *, k: int = 1, level: float = 0.95) -> dict[str, Any]:
    """pass@k of `ours` minus `theirs` on the problems both have, paired by problem, with an interval."""
    a, b = ({group[0].id: group for group in by_problem(graded)} for graded in (ours, theirs))
    shared = [id for id in a if id in b]
    if not shared:
        raise ValueError("the two evaluations have no problem in common")
    pairs = [counts([groups[id] for id in shared]) for groups in (a, b)]
    difference = compare_pass_at_k(pairs[0], pairs[1], k, level=level)
    fewer = [np.mean([g.tokens for id in shared for g in groups[id]]) for groups in (a, b)]
    return {"problems": len(shared), f"pass_at_{k}": _interval(difference), "tokens": float(fewer[0] - fewer[1])}


def write_report(
    out: str | pathlib.Path,
    graded: Sequence[Graded],
    *,
    about: Mapping[str, Any],
    summaries: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes report.json, report.md and problems.jsonl into `out` and returns the report.

    Args:
      about: benchmark, fingerprint, settings, overlap: whatever says which figures these are.
      summaries: of each mode, see `summarise`.
    """
    out = pathlib.Path(out)
    report = {**about, "modes": dict(summaries), "comparisons": dict(comparisons or {})}
    (out / "report.json").write_text(
        json.dumps(report, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8"
    )
    (out / "report.md").write_text(as_text(report), encoding="utf-8")
    with (out / "problems.jsonl").open("w", encoding="utf-8") as stream:
        for thinking in MODES:
            for group in by_problem([g for g in graded if g.thinking == thinking]):
                stream.write(json.dumps(_problem_row(group), ensure_ascii=False) + "\n")
    return report


def as_text(report: Mapping[str, Any]) -> str:
    """The report as Markdown: one column a mode."""
    modes = report["modes"]
    settings = report.get("settings", {})
    lines = [f"# {report.get('benchmark', 'evaluation')}", ""]
    for name in ("checkpoint", "endpoint", "model", "fingerprint", "file"):
        if value := report.get(name) or settings.get(name):
            lines.append(f"{name}: {value}  ")
    rows: dict[str, list[str]] = {}
    for summary in modes.values():
        for label, text in _rows(summary).items():
            rows.setdefault(label, [])
            rows[label].append(text)
    lines += ["", "| | " + " | ".join(modes) + " |", "|---" * (len(modes) + 1) + "|"]
    lines += [f"| {label} | " + " | ".join(texts) + " |" for label, texts in rows.items()]
    for mode, summary in modes.items():
        if bins := summary.get("by_difficulty"):
            lines += [
                "",
                f"By difficulty, {mode} (Spearman ρ of difficulty and tokens: {_number(bins['spearman'])}):",
                "",
            ]
            lines += ["| difficulty | problems | accuracy | thinking tokens | tokens |", "|---|---|---|---|---|"]
            lines += [
                f"| {_range(b)} | {b['problems']} | {b['accuracy']:.1%} | {b['thinking_tokens']:.0f} | {b['tokens']:.0f} |"
                for b in bins["bins"]
            ]
    for name, difference in report.get("comparisons", {}).items():
        key = next(key for key in difference if key.startswith("pass_at_"))
        lines += [
            "",
            f"{name}: {key.replace('pass_at_', 'pass@')} {_signed(difference[key])}, tokens {difference['tokens']:+.0f}",
        ]
    if overlap := report.get("overlap"):
        lines += ["", f"Overlap with the training data: {overlap}"]
    if settings:
        lines += ["", "Settings: " + json.dumps(settings, ensure_ascii=False, default=str)]
    return "\n".join(lines) + "\n"


def _rows(summary: Mapping[str, Any]) -> dict[str, str]:
    rows = {"problems × samples": f"{summary['problems']} × {summary['samples'] / summary['problems']:g}"}
    rows["accuracy"] = _percent(summary["accuracy"])
    rows |= {f"pass@{j}": _percent(value) for j, value in summary["pass_at_k"].items() if j != "1"}
    if "majority" in summary:
        rows["majority vote"] = _percent(summary["majority"])
    for name in ("thinking_tokens", "tokens"):
        spread = summary[name]
        rows[f"{name.replace('_', ' ')}: mean / median / p95"] = " / ".join(
            f"{spread[s]:.0f}" for s in ("mean", "median", "p95")
        )
    rows["truncated"] = f"{summary['truncated']:.1%}"
    rows |= {f"accuracy within {b['tokens']} tokens": f"{b['accuracy']:.1%}" for b in summary["at_budget"]}
    rows["area under accuracy against budget"] = f"{summary['budget_area']:.3f}"
    rows["tokens per correct answer"] = _number(summary["tokens_per_correct"])
    rows["seconds per correct answer"] = _number(summary["seconds_per_correct"])
    rows["could not be graded"] = ", ".join(f"{v} × {k}" for k, v in summary["failed"].items()) or "0"
    return rows


def _problem_row(group: Sequence[Graded]) -> dict[str, Any]:
    n, c = len(group), sum(g.correct for g in group)
    return {
        "id": group[0].id,
        "thinking": group[0].thinking,
        "n": n,
        "correct": c,
        "pass_at_k": {str(k): pass_at_k(n, c, k) for k in (2**i for i in range(n.bit_length())) if k <= n},
        "tokens": float(np.mean([g.tokens for g in group])),
        "thinking_tokens": float(np.mean([g.thinking_tokens for g in group])),
        "difficulty": group[0].difficulty,
        "reference": group[0].reference,
        "answers": [g.answer for g in group],
    }


def _by_difficulty(problems: Sequence[Sequence[Graded]]) -> dict[str, Any]:
    from scipy.stats import spearmanr

    difficulty = np.array([group[0].difficulty for group in problems], float)
    tokens = np.array([np.mean([g.tokens for g in group]) for group in problems])
    values = np.unique(difficulty)
    if len(values) <= DISTINCT:
        bins = [(v, v, difficulty == v) for v in values]
    else:
        edges = np.unique(np.quantile(difficulty, np.linspace(0, 1, 6)))
        last = len(edges) - 2
        bins = [
            (edges[i], edges[i + 1], (difficulty >= edges[i]) & ((difficulty < edges[i + 1]) | (i == last)))
            for i in range(last + 1)
        ]
    varies = len(values) > 1 and len(np.unique(tokens)) > 1
    return {
        "spearman": float(spearmanr(difficulty, tokens).statistic) if varies else None,
        "bins": [
            {"low": float(low), "high": float(high), "problems": int(mine.sum())}
            | {
                "accuracy": _mean([problems[i] for i in np.flatnonzero(mine)], lambda g: g.correct),
                "tokens": float(tokens[mine].mean()),
                "thinking_tokens": _mean([problems[i] for i in np.flatnonzero(mine)], lambda g: g.thinking_tokens),
            }
            for low, high, mine in bins
            if mine.any()
        ],
    }


def _at_budgets(problems: Sequence[Sequence[Graded]], budgets: Sequence[int]) -> list[dict[str, float]]:
    return [
        {"tokens": budget, "accuracy": _mean(problems, lambda g: g.correct and g.tokens <= budget)}  # noqa: B023
        for budget in sorted(budgets)
    ]


def _mean(problems: Sequence[Sequence[Graded]], value) -> float:
    return float(np.mean([np.mean([value(g) for g in group]) for group in problems]))


def _powers(limit: int) -> list[int]:
    return sorted({min(limit, 2**i) for i in range(max(0, limit.bit_length() - 5), limit.bit_length() + 1)})


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), "median": float(np.median(values)), "p95": float(np.quantile(values, 0.95))}


def _interval(interval: Interval) -> dict[str, float]:
    return interval._asdict()


def _reason(failed: str) -> str:
    """The kind of a failure: without what differs from sample to sample."""
    return ": ".join(failed.split(": ")[:2])[:80]


def _percent(value: Mapping[str, float]) -> str:
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def _signed(value: Mapping[str, float]) -> str:
    return f"{value['value']:+.1%} [{value['low']:+.1%}, {value['high']:+.1%}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _range(bin: Mapping[str, float]) -> str:
    return f"{bin['low']:g}" if bin["low"] == bin["high"] else f"{bin['low']:g} to {bin['high']:g}"
