"""Problems that do not belong in training data: near-duplicates of earlier ones, and benchmark problems."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dqjax.data.decontaminate import Benchmarks, Match
from dqjax.data.near_duplicates import NearConfig, Signer, find_near_duplicates
from dqjax.data.parallel import map_chunks
from dqjax.data.records import Record


@dataclasses.dataclass(frozen=True, slots=True)
class Removed:
    """Why a problem goes. `of`: the benchmark problem it matches, with its text; "" for a near-duplicate."""

    count: str
    of: str = ""
    test: str = ""
    score: float | None = None
    text: str = ""


def find_removed(
    records: Iterable[Record],
    keys: Sequence[int],
    *,
    near: NearConfig | None,
    benchmarks: Benchmarks | None,
    workers: int | None = None,
) -> dict[int, Removed]:
    """Reads the records once; returns reasons by `question_key` for the questions to remove.

    Args:
      records: read to their end even where nothing is looked for. Neighbours with one question are looked at once.
      keys: the question keys of the records read so far, filled by the reader.
    """
    if near is None and benchmarks is None:
        for _ in records:
            pass
        return {}
    places: list[int] = []

    def questions() -> Iterator[Record]:
        for i, record in enumerate(records):
            if i == 0 or keys[i] != keys[i - 1]:
                places.append(i)
                yield record

    found: dict[int, Match] = {}

    def signed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        at = 0
        for matches, signatures in map_chunks(_Look(near, benchmarks), questions(), workers=workers):
            found.update((at + i, match) for i, match in enumerate(matches) if match is not None)
            at += len(matches)
            if signatures is not None:
                yield signatures

    removed: dict[int, Removed] = {}
    if near is None:
        for _ in signed():
            pass
    else:
        original = find_near_duplicates(signed(), near.threshold)
        for i in np.flatnonzero(original != np.arange(len(original))).tolist():
            key, earlier = keys[places[i]], keys[places[original[i]]]
            if key != earlier:  # the same question, elsewhere, is no near-duplicate
                removed[key] = Removed("near-duplicates")
    for i, match in found.items():
        count = f"contaminated by {match.benchmark}"
        removed[keys[places[i]]] = Removed(
            count, f"{match.benchmark}:{match.problem}", match.test, match.score, match.text
        )
    return removed


@dataclasses.dataclass
class _Look:
    """(matches, signatures) of some records; what is not looked for is None."""

    near: NearConfig | None
    benchmarks: Benchmarks | None

    def __post_init__(self):
        self._sign = Signer(self.near) if self.near else None

    def __call__(self, records: list[Record]) -> tuple[list[Match | None], tuple[np.ndarray, np.ndarray] | None]:
        matches = self.benchmarks(records) if self.benchmarks else [None] * len(records)
        return matches, self._sign([record.question for record in records]) if self._sign else None
