"""Rows brought together by problem, in the order in which the problems begin."""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from dqjax.data.chain_rows import Row


def runs(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Neighbouring rows of one problem, as lists."""
    for _, group in itertools.groupby(rows, key=lambda row: row["problem_id"]):
        yield list(group)


def problems(read: Callable[[], Iterator[Row]]) -> Iterator[list[Row]]:
    """All rows of each problem, as lists, wherever they stand.

    The rows are read once for the problems alone (8 bytes a row). Where each problem stands in one piece, they are then
    streamed; otherwise they go to a temporary file, from which they are picked in order.

    Args:
      read: gives the rows from the beginning, every time it is called.
    """
    hashes = np.fromiter((_hash(row["problem_id"]) for row in read()), np.uint64)
    pieces = int(np.count_nonzero(hashes[1:] != hashes[:-1])) + 1 if len(hashes) else 0
    if pieces == len(np.unique(hashes)):
        yield from runs(read())
        return
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first[inverse], kind="stable")
    with tempfile.TemporaryFile() as spill:
        offsets = np.zeros(len(hashes) + 1, np.int64)
        for i, row in enumerate(read()):
            offsets[i + 1] = offsets[i] + spill.write(json.dumps(row).encode() + b"\n")

        def pick() -> Iterator[Row]:
            for i in order.tolist():
                spill.seek(offsets[i])
                yield json.loads(spill.read(offsets[i + 1] - offsets[i]))

        yield from runs(pick())


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
