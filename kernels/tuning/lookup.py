"""Which of its legal choices of blocks a kernel takes: the one measured on this kind of device, else the kernel's rule.

Tables are JSON files beside this module, one a kind of device, as `python -m dqjax.bench kernels --tune` writes them:
an entry names the problem and the choice. Nothing is measured while a program runs.
"""

import contextlib
import contextvars
import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax

Choice = int | tuple[int, ...]


class Problem(NamedTuple):
    """What a choice may depend on.

    Attributes:
      kernel: the function that asks.
      backend: its backend.
      dtype: of the inputs; None where the choice is made before they are known, as the two that follow.
      head_size: numbers in a head, or in a hidden state.
      ratio: query heads to a key-value head.
      rows: what is computed side by side.
      length: what each of them runs along: keys, or the vocabulary.
    """

    kernel: str
    backend: str
    dtype: str | None
    head_size: int | None
    ratio: int | None
    rows: int
    length: int

    def bucket(self) -> "Problem":
        """The same with `rows` and `length` rounded up to powers of two."""
        return self._replace(rows=_power_of_two(self.rows), length=_power_of_two(self.length))


Table = dict[Problem, Choice]
"""By bucket."""


class Trial(NamedTuple):
    """Choices given beforehand, and what was asked for.

    Attributes:
      given: by bucket; the rest follows its rule.
      asked: by bucket, the legal choices and the rule's.
    """

    given: Table
    asked: dict[Problem, tuple[tuple[Choice, ...], Choice]]


_TRIAL: contextvars.ContextVar[Trial | None] = contextvars.ContextVar("trial", default=None)


@contextlib.contextmanager
def trial(given: Table) -> Iterator[Trial]:
    """Inside, kernels that are traced take the choices given instead of the table's."""
    token = _TRIAL.set(Trial(given, {}))
    try:
        yield _TRIAL.get()
    finally:
        _TRIAL.reset(token)


def chosen(problem: Problem, choices: Sequence[Choice], rule: Choice) -> Choice:
    """The choice for a problem on the default device.

    Args:
      problem: as it is, not rounded.
      choices: what is legal for this very problem.
      rule: what to take where the table has nothing near, or nothing legal.
    """
    bucket = problem.bucket()
    on_trial = _TRIAL.get()
    if on_trial is not None:
        on_trial.asked[bucket] = tuple(choices), rule
        return on_trial.given.get(bucket, rule)
    choice = nearest(read(path_for(jax.devices()[0].device_kind)), bucket)
    return choice if choice in choices else rule


def nearest(table: Table, bucket: Problem) -> Choice | None:
    """The choice of the nearest entry that differs at most by a factor of two in rows and in length, or None; of two as
    near, that of the smaller problem."""

    def distance(entry):
        return tuple(abs(math.log2(a / b)) for a, b in ((entry.rows, bucket.rows), (entry.length, bucket.length)))

    near = [e for e in table if e[:5] == bucket[:5] and max(distance(e)) <= 1]
    return table[min(near, key=lambda e: (sum(distance(e)), e[5:]))] if near else None


def path_for(device_kind: str) -> pathlib.Path:
    """The table of a kind of device, e.g. "NVIDIA H200": nvidia_h200.json."""
    return pathlib.Path(__file__).parent / (re.sub(r"\W+", "_", device_kind.lower()) + ".json")


@functools.cache
def read(path: pathlib.Path) -> Table:
    """A table, empty where there is no file."""
    if not path.exists():
        return {}
    entries = json.loads(path.read_text())["entries"]
    return {Problem(*(e[name] for name in Problem._fields)): _frozen(e["choice"]) for e in entries}


def _frozen(choice: int | list[int]) -> Choice:
    return tuple(choice) if isinstance(choice, list) else choice


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
