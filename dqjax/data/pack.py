"""Sequences of tokens, packed into rows of a fixed length.

Which sequence goes into which row is planned from lengths alone, best fit decreasing; the arrays are made afterwards::

    tokens         a a a a b b b c c 0      sequence a, b, c, then padding
    targets        a a a . b b . c . .      the next token of the same sequence
    trained        0 1 1 . 0 1 . 1 . .      `trained[i]` of the token that is the target, so one place earlier

A sequence's first token is nobody's target. Padding is segment 0; nothing is inferred from token ids.
"""

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Shaped

from dqjax.types import Batch

Reduction = Literal["token_mean", "sequence_mean", "sum"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """One sequence, ready to be packed.

    Attributes:
      ids: the tokens.
      trained: whether token i is learnt, as a target. `trained[0]` has no effect.
      values: one number a sequence, for the side arrays [B, S]; ints become int32, floats float32.
      token_values: name → one entry a token, [n] or [n, ...] of any dtype, for side arrays [B, T, ...]; entry i belongs
        to token i as a target and lands where `targets` holds that token, as the log-probability of a sampled token
        must.
    """

    ids: Int[np.ndarray, " n"]
    trained: Bool[np.ndarray, " n"]
    values: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    token_values: Mapping[str, Shaped[np.ndarray, "n ..."]] = dataclasses.field(default_factory=dict)

    @property
    def trained_count(self) -> int:
        """Targets that are learnt."""
        return int(np.count_nonzero(self.trained[1:]))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RowPlan:
    """Which items lie in which of R rows: row r holds `items[offsets[r]:offsets[r+1]]`, in that order."""

    offsets: Int[np.ndarray, " R+1"]
    items: Int[np.ndarray, " items"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    @property
    def columns(self) -> int:
        """The most items that a row holds."""
        return int(np.diff(self.offsets).max(initial=0))

    def sums(self, values: Int[np.ndarray, " items"]) -> Int[np.ndarray, " R"]:
        """Sum over the items of each row of `values[item]`."""
        running = np.concatenate([[0], np.cumsum(values[self.items])])
        return running[self.offsets[1:]] - running[self.offsets[:-1]]


def best_fit_decreasing(lengths: Sequence[int] | Int[np.ndarray, " items"], row_length: int) -> RowPlan:
    """Puts items into rows: longest first, each into the fullest row that still takes it.

    Ties: equal lengths in their order; of equally full rows the one that became so first. The plan is a function of its
    arguments alone, so every host finds the same one.

    Raises:
      ValueError: an item is empty or longer than a row.
    """
    lengths = np.asarray(lengths, np.int64)
    if len(lengths) and (lengths.min() < 1 or lengths.max() > row_length):
        raise ValueError(f"items must have 1 to {row_length} tokens, got {lengths.min()} to {lengths.max()}")
    rows: list[list[int]] = []
    by_space: dict[int, deque[int]] = {}
    spaces = (
        0  # bit s is set where a row with s free places exists: the best fit is the lowest set bit from `length` on
    )
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].popleft()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := space - length:
            by_space.setdefault(left, deque()).append(row)
            spaces |= 1 << left
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return RowPlan(offsets, np.array([item for row in rows for item in row], np.int64))


def pack_rows(
    rows: Sequence[Sequence[Tokens]],
    row_length: int,
    *,
    columns: int,
    reduction: Reduction = "token_mean",
    totals: tuple[int, int] | None = None,
    pad_id: int = 0,
    like: Sequence[Tokens] = (),
) -> Batch:
    """The arrays of a batch, from the sequences of each of its rows.

    Args:
      rows: for each row its sequences, which fit into `row_length` together; a row may be empty.
      columns: S, the width of the side arrays, at least the most sequences in a row.
      reduction: `token_mean` weighs a token 1/N, N trained tokens; `sequence_mean` 1/(its sequence's trained tokens ×
        the sequences that have any); `sum` 1.
      totals: (trained tokens, sequences with any) of the *global* batch, where `rows` is a part of it.
      pad_id: token that fills rows up.
      like: sequences of the same source. Where all rows are empty they say which side arrays there are, so that a host
        without rows has the arrays of the others.

    Returns:
      A `Batch` of numpy arrays. In `side`, columns (or tokens) without a value hold -1 (ints) or 0 (floats).

    Raises:
      ValueError: a row overflows, or sequences disagree about the names of their values.
    """
    shape = (len(rows), row_length)
    tokens, targets = np.full(shape, pad_id, np.int32), np.full(shape, pad_id, np.int32)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    index, weight = np.full(shape, columns, np.int32), np.zeros(shape, np.float32)
    everything = [sequence for row in rows for sequence in row]
    side, per_token = _side_arrays(everything or like, len(rows), columns, row_length)
    if totals is None:
        counts = [sequence.trained_count for sequence in everything]
        totals = sum(counts), sum(map(bool, counts))
    for r, row in enumerate(rows):
        if (used := sum(len(s.ids) for s in row)) > row_length or len(row) > columns:
            raise ValueError(f"a row takes {row_length} tokens of {columns} sequences, got {used} tokens of {len(row)}")
        start = 0
        for k, sequence in enumerate(row):
            n = len(sequence.ids)
            here, labels = slice(start, start + n), slice(start, start + n - 1)
            tokens[r, here] = sequence.ids
            targets[r, labels] = sequence.ids[1:]
            segments[r, here] = k + 1
            positions[r, here] = np.arange(n)
            index[r, here] = k
            weight[r, labels] = sequence.trained[1:] * _token_weight(sequence, reduction, totals)
            for name, value in sequence.values.items():
                side[name][r, k] = value
            for name, values in sequence.token_values.items():
                per_token[name][r, labels] = values[1:]
            start += n
    return Batch(tokens, targets, segments, positions, weight, index, side | per_token)


def pack_items(
    items: Sequence[Sequence[Tokens]],
    row_length: int,
    *,
    row_multiple: int = 1,
    columns: int | None = None,
    reduction: Reduction = "token_mean",
    pad_id: int = 0,
) -> Batch:
    """Packs items that were tokenised just now: samples of a policy (items of one), preference pairs (items of two).

    The sequences of an item stay in one row, next to each other, so no micro-batch border cuts a pair.

    Args:
      items: each a sequence of `Tokens`.
      row_multiple: empty rows are added up to a multiple of it (micro-batches × batch shards).
      columns: S; by default the most sequences in a row, rounded up to a multiple of 8, which bounds recompilation.

    Raises:
      ValueError: an item is longer than a row.
    """
    plan = best_fit_decreasing([sum(len(s.ids) for s in item) for item in items], row_length)
    rows = [[sequence for i in plan[r] for sequence in items[i]] for r in range(len(plan))]
    rows += [[] for _ in range(-len(rows) % row_multiple)]
    if columns is None:
        columns = max(8, -(-max(map(len, rows), default=0) // 8) * 8)
    return pack_rows(rows, row_length, columns=columns, reduction=reduction, pad_id=pad_id)


def _token_weight(sequence: Tokens, reduction: Reduction, totals: tuple[int, int]) -> float:
    match reduction:
        case "token_mean":
            return 1.0 / max(totals[0], 1)
        case "sequence_mean":
            return 1.0 / (max(sequence.trained_count, 1) * max(totals[1], 1))
        case "sum":
            return 1.0
    raise ValueError(f"reduction: expected token_mean, sequence_mean or sum, got {reduction!r}")


def _side_arrays(sequences: Sequence[Tokens], rows: int, columns: int, row_length: int) -> tuple[dict, dict]:
    if not sequences:
        return {}, {}
    first = sequences[0]
    for s in sequences:
        if s.values.keys() != first.values.keys() or s.token_values.keys() != first.token_values.keys():
            raise ValueError(
                f"sequences of a batch carry the same values; got {sorted(first.values)}, {sorted(first.token_values)} "
                f"and {sorted(s.values)}, {sorted(s.token_values)}"
            )
    side = {
        name: np.full((rows, columns), -1, np.int32)
        if all(isinstance(s.values[name], (int, np.integer)) for s in sequences)
        else np.zeros((rows, columns), np.float32)
        for name in first.values
    }
    per_token = {}
    for name, values in first.token_values.items():
        empty = -1 if np.issubdtype(values.dtype, np.integer) else 0
        per_token[name] = np.full((rows, row_length, *values.shape[1:]), empty, values.dtype)
    return side, per_token
