"""What a run would cost, from a run over a few rows."""

import dataclasses
from collections.abc import Mapping, Sequence

from dqjax.data.teacher import TeacherConfig


@dataclasses.dataclass(frozen=True)
class Trial:
    """A step over a few rows: its `Job.usage`, how many rows were taken at the source, and how many there are."""

    step: str
    usage: Mapping[str, float]
    sampled: int
    total: int


def scaled_report(trials: Sequence[Trial], teachers: Sequence[TeacherConfig]) -> str:
    """Tokens, money and hours of the whole, one line a step that asks.

    Hours: the larger of calls · mean seconds / slots and what the rates allow. Steps are taken to let rows through in
    the same proportion throughout.
    """
    if not any(trial.sampled for trial in trials):
        return "no rows: nothing to estimate"
    lines = [f"{trials[0].sampled:,} of {trials[0].total:,} rows were run; the whole would take about"]
    sums = [0.0] * 5
    for trial in trials:
        parts = [_of_teacher(teacher, trial.usage) for teacher in teachers if trial.usage.get(f"{teacher.name} calls")]
        if parts:
            figures = [trial.total / trial.sampled * sum(column) for column in zip(*parts)]
            lines.append(_line(trial.step, figures))
            sums = [a + b for a, b in zip(sums, figures)]
    return "\n".join([*lines, _line("together", sums)])


def _of_teacher(teacher: TeacherConfig, used: Mapping[str, float]) -> tuple[float, ...]:
    """(calls, prompt tokens, answer tokens, money, hours)."""
    calls, prompt, answer, seconds = (
        used[f"{teacher.name} {what}"] for what in ("calls", "prompt_tokens", "completion_tokens", "seconds")
    )
    slots = sum(e.concurrency for e in teacher.endpoints) if teacher.local is None else teacher.local.rows
    # Balanced endpoints share the calls by their slots.
    money = sum(e.concurrency / slots * (prompt * e.price_in + answer * e.price_out) / 1e6 for e in teacher.endpoints)
    least = [seconds / slots]
    for rate, units in (("requests_per_minute", calls), ("tokens_per_minute", prompt + answer)):
        limits = [getattr(e, rate) for e in teacher.endpoints]
        if limits and None not in limits:
            least.append(60 * units / sum(limits))
    return calls, prompt, answer, money, max(least) / 3600


def _line(name: str, figures: Sequence[float]) -> str:
    calls, prompt, answer, money, hours = figures
    tokens = f"{prompt:>14,.0f} + {answer:,.0f} tokens"
    return f"  {name:<16} {calls:>12,.0f} calls {tokens}, {money:,.2f} money, {hours:,.2f} hours"
