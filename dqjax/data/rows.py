"""Documents planned into packed rows: what happens to the too long ones, and what each row teaches."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from jaxtyping import Int

from dqjax.data.documents import Documents
from dqjax.data.pack import RowPlan, Tokens, best_fit_decreasing


TokenValues = Callable[[str, np.ndarray, np.ndarray], Mapping[str, np.ndarray]]
"""(sample id, tokens, which are trained) → what `Tokens.token_values` takes."""


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRows:
    """Documents, or pieces of them, planned into rows.

    Attributes:
      documents: where the tokens are.
      document, begin, end: piece p is tokens begin..end of a document.
      plan: rows of pieces.
      train_on_prompt: prompts are in the loss.
      stage: curriculum stage, a side value.
      row_length: T.
      token_values: what else each piece carries, a cached teacher's rows for instance.
    """

    documents: Documents
    document: Int[np.ndarray, " P"]
    begin: Int[np.ndarray, " P"]
    end: Int[np.ndarray, " P"]
    plan: RowPlan
    train_on_prompt: bool
    stage: int
    row_length: int
    token_values: TokenValues | None = None

    @functools.cached_property
    def trained_tokens(self) -> Int[np.ndarray, " R"]:
        """Trained tokens of each row."""
        return self.plan.sums(self._counts)

    @functools.cached_property
    def trained_sequences(self) -> Int[np.ndarray, " R"]:
        """Pieces of each row that have any."""
        return self.plan.sums(self._counts > 0)

    @property
    def _counts(self) -> Int[np.ndarray, " P"]:
        return _trained_counts(self.documents, self.document, self.begin, self.end, self.train_on_prompt)

    def __len__(self) -> int:
        return len(self.plan)

    def row(self, r: int) -> list[Tokens]:
        """The sequences of row r. Their side values: `row` (document number), `source`, `stage`."""
        return [self._piece(p) for p in self.plan[r].tolist()]

    def _piece(self, p: int) -> Tokens:
        d, begin, end = int(self.document[p]), int(self.begin[p]), int(self.end[p])
        first = 0 if self.train_on_prompt else int(self.documents.answer_start[d])
        ids, trained = self.documents.ids_of(d)[begin:end], np.arange(begin, end) >= first
        values = {"row": d, "source": int(self.documents.source[d]), "stage": self.stage}
        more = self.token_values(self.documents.ids[d], ids, trained) if self.token_values else {}
        return Tokens(ids, trained, values, more)


def plan_rows(
    documents: Documents,
    chosen: Int[np.ndarray, " chosen"],
    *,
    row_length: int,
    too_long: Literal["drop", "truncate", "split"],
    train_on_prompt: bool = False,
    stage: int = 0,
    token_values: TokenValues | None = None,
) -> tuple[PackedRows, int]:
    """Packs the documents numbered `chosen` (a number may occur twice) into rows.

    Args:
      too_long: `drop`, `truncate` or `split`, for documents over `row_length`. What is left without a trained token,
        such as a prompt that fills the row, is dropped.
      token_values: see `PackedRows`.

    Returns:
      The rows, and how many of `chosen` were too long.
    """
    lengths = documents.lengths[chosen]
    long = lengths > row_length
    if too_long == "split":
        pieces = -(-lengths // row_length)
        document = np.repeat(chosen, pieces)
        part = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        begin = part * row_length
    else:
        document = chosen[~long] if too_long == "drop" else chosen
        begin = np.zeros(len(document), np.int64)
    end = np.minimum(begin + row_length, documents.lengths[document])
    learns = _trained_counts(documents, document, begin, end, train_on_prompt) > 0
    document, begin, end = document[learns], begin[learns], end[learns]
    plan = best_fit_decreasing(end - begin, row_length)
    rows = PackedRows(documents, document, begin, end, plan, train_on_prompt, stage, row_length, token_values)
    return rows, int(long.sum())


def _trained_counts(
    documents: Documents, document: np.ndarray, begin: np.ndarray, end: np.ndarray, train_on_prompt: bool
) -> Int[np.ndarray, " P"]:
    first = 0 if train_on_prompt else documents.answer_start[document]
    return np.maximum(end - np.maximum(begin + 1, first), 0)  # a piece's first token is nobody's target
