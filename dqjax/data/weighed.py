"""Batches whose items are weighed over the whole of them: one loader for training, one pass over what is held out."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from dqjax.data.loader import Loader, Stage
from dqjax.data.pack import Tokens, pack_rows
from dqjax.types import Batch


class WeighedRows(Protocol):
    """A plan of rows, made one by one. `columns` is the most sequences of a row."""

    row_length: int
    columns: int

    def __len__(self) -> int: ...

    def weights(self, rows: Sequence[int]) -> Any:
        """What an item of these rows weighs in a mean over all of theirs."""

    def row(self, r: int, weights: Any) -> list[Tokens]:
        """The sequences of row r."""


class WeighedLoader(Loader):
    """A `Source` of batches, without end; weights are normalised over the global batch."""

    def __init__(self, rows: WeighedRows, **options: Any):
        """`options` are those of `Loader`."""
        super().__init__([Stage(rows, None)], **options)
        self.columns = rows.columns

    def batch_at(self, position: int) -> Batch:
        """The batch whose first row is number `position` since the start of training."""
        rows = self.stages[0].rows
        places = [self._shuffled(*self._locate(p)) for p in range(position, position + self.batch_rows)]
        weights = rows.weights(places)
        local = [rows.row(places[i], weights) for i in self.local_rows]
        return pack_rows(local, self.row_length, columns=self.columns, reduction="sum", pad_id=self._pad_id)


class WeighedEvaluation:
    """Held-out items in a fixed order; iterating yields batches, the last filled up with empty rows.

    Weights are normalised over the whole set: the batches' losses add up to the mean over its items.
    """

    def __init__(
        self, rows: WeighedRows, *, batch_rows: int, local_rows: Sequence[int] | None = None, pad_id: int = 0
    ):
        self.rows, self.batch_rows = rows, batch_rows
        self.local_rows = list(range(batch_rows) if local_rows is None else local_rows)
        self._pad_id = pad_id

    def __iter__(self) -> Iterator[Batch]:
        rows, weights = self.rows, self.rows.weights(range(len(self.rows)))
        shape = {"columns": rows.columns, "reduction": "sum", "pad_id": self._pad_id, "like": rows.row(0, weights)}
        for first in range(0, len(rows), self.batch_rows):
            local = [rows.row(first + i, weights) if first + i < len(rows) else [] for i in self.local_rows]
            yield pack_rows(local, rows.row_length, **shape)
