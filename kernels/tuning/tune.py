"""Measures the legal choices of blocks and writes the fastest into a table for `lookup`."""

import json
import logging
import pathlib
from collections.abc import Iterable
from typing import Any

import jax

from dqjax.kernels.exact import TOLERANCE, relative_error
from dqjax.kernels.measure import Candidate, Timing, machine, measure
from dqjax.kernels.tuning.lookup import Problem, Table, trial
from dqjax.kernels.workloads import Work

log = logging.getLogger(__name__)


def tune(works: Iterable[Work], path: pathlib.Path, repetitions: int, rounds: int) -> None:
    """Times the default backend of ours with every choice that it has, and writes the fastest; other entries stay.

    What a kernel may choose from is what it asks `lookup` for while it is traced. Where several works ask for the same,
    the last decides: that with the backward pass. A choice that is faster than the rule's by no more than the spread of
    the rounds is not taken.
    """
    questions = {}
    for work in works:
        make = next(make for name, make in work.candidates.items() if name.startswith("dqjax"))
        for problem, (choices, rule) in _made(make, {})[1].items():
            if len(choices) > 1:
                questions[problem] = work, make, choices, rule
    entries = {_key(e): e for e in (json.loads(path.read_text())["entries"] if path.exists() else [])}
    for problem, (work, make, choices, rule) in questions.items():
        named = {json.dumps(choice): choice for choice in choices}
        candidates = {}
        for name, choice in named.items():
            try:
                candidate = _made(make, {problem: choice})[0]
                if (error := relative_error(work.part(candidate.results()), work.want)) > TOLERANCE:
                    raise ArithmeticError(f"wrong by {error:.3g}")
                candidates[name] = candidate
            except Exception as error:  # what does not compile, or is wrong, is not chosen
                log.info("%s, %s, cannot take %s: %s", problem.kernel, problem.backend, name, str(error)[:200])
        timings = measure(candidates, repetitions=repetitions, rounds=rounds)
        if not timings:
            raise ArithmeticError(f"{problem.kernel}, {problem.backend}: no choice of blocks compiles and is right")
        entry = problem._asdict() | {
            "choice": named[_fastest(timings, json.dumps(rule))],
            "milliseconds": {name: round(timing.ms, 4) for name, timing in timings.items()},
        }
        log.info("%s", json.dumps(entry))
        entries[_key(entry)] = entry
        table = {"machine": machine(), "entries": [entries[key] for key in sorted(entries)]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(table, indent=1) + "\n")


def _made(make: Any, given: Table) -> tuple[Candidate, dict[Problem, Any]]:
    """The candidate compiled with the choices given, and what its kernels asked for."""
    jax.clear_caches()  # a kernel traced with another choice must not come back
    with trial(given) as asked:
        return make(), asked.asked


def _fastest(timings: dict[str, Timing], rule: str) -> str:
    """The choice of least time; the rule's where that ties with it."""
    best = min(timings, key=lambda name: timings[name].ms)
    tie = 1 + max(timings[name].spread for name in (best, rule) if name in timings)
    return rule if rule in timings and timings[rule].ms <= timings[best].ms * tie else best


def _key(entry: dict[str, Any]) -> str:
    """What orders entries: the problem, numbers by size."""
    values = (entry[name] for name in Problem._fields)
    return "/".join(f"{value:012d}" if isinstance(value, int) else str(value) for value in values)
