"""Rows of the sources of a config, made into items that fit into a packed row; what cannot be used is quarantined."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from dqjax.config import ConfigError
from dqjax.data.config import DataConfig, SourceConfig
from dqjax.data.documents import write_rejected
from dqjax.data.records import BadRow, Record
from dqjax.data.sources import RawRow, Rejected, merge_columns, read_rows, records_in

_CHUNK = 512  # rows made at once


class TooLong(BadRow):
    """An item that would be good, were it not longer than a row."""


class Item(NamedTuple):
    """What was made of a record.

    Attributes:
      source: index into the sources.
      where: `file:line` of its row.
    """

    source: int
    where: str
    record: Record
    made: Any


Make = Callable[[Sequence[RawRow], Sequence[Record]], Sequence[Any]]
"""(raw rows, their records) → one thing a record; a BadRow says why there is none."""


def read_items(
    config: DataConfig, sources: Sequence[SourceConfig], make: Make, *, what: str
) -> tuple[list[Item], dict[str, int]]:
    """The items of `sources`, and counts of the others; those go to the quarantine file with file, line and reason.

    Args:
      what: what an item is called in messages.

    Raises:
      ConfigError: a source cannot be read, more than `max_bad_share` of the rows are bad (too long is not bad), or none
        is left.
    """
    found: list[Item] = []
    bad: list[Rejected] = []
    too_long: list[Rejected] = []
    read = 0
    for i, source in enumerate(sources):
        names = merge_columns(config.columns, source.columns)
        rows = iter(tqdm(read_rows(source), f"tokenising {source.label}", unit=" rows", disable=None, mininterval=1.0))
        while chunk := list(itertools.islice(rows, _CHUNK)):
            read += len(chunk)
            items = [(raw, item) for raw in chunk for item in records_in(raw, names, source.label)]
            bad += [item for _, item in items if isinstance(item, Rejected)]
            good = [(raw, item) for raw, item in items if isinstance(item, Record)]
            for (raw, record), made in zip(good, make([r for r, _ in good], [r for _, r in good]), strict=True):
                if isinstance(made, BadRow):
                    (too_long if isinstance(made, TooLong) else bad).append(Rejected(raw.file, raw.line, str(made)))
                else:
                    found.append(Item(i, f"{raw.file}:{raw.line}", record, made))
    rejected = sorted(bad + too_long, key=lambda row: (row.file, row.line))
    write_rejected(rejected, read, max_share=1.0, path=config.quarantine)
    if len(bad) > config.max_bad_share * read:
        first = min(bad, key=lambda row: (row.file, row.line))
        raise ConfigError(
            f"{len(bad)} of {read} rows are no usable {what}, more than data.max_bad_share = {config.max_bad_share:g}; "
            f"the first at {first.file}:{first.line}: {first.reason}"
        )
    if not found:
        raise ConfigError(f"data: no {what} of {read} rows in {', '.join(s.label for s in sources)} can be used")
    return found, {"bad": len(bad), "too_long": len(too_long)}
