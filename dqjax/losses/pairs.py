"""Pairs of sequences inside packed rows: who is preferred over whom, and what a pair weighs.

Both sequences of a pair lie in one row, so a micro-batch never cuts a pair. The side arrays, `[B, S]`::

    pair_id   7  7  3  3 -1     equal for the two of a pair; -1: in none
    chosen    1  0  1  0 -1     1 the preferred, 0 the other
    weight    w  w  w  w  0     1 / pairs of the global batch, from `weigh_pairs`

Values of pairs are arrays `[B, S]` too, at the column of the chosen sequence.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dqjax.types import Batch


class Pairs(NamedTuple):
    """The pairs of a batch, each at the column of its chosen sequence.

    Attributes:
      present: a pair is here.
      weight: of the pair in the loss; 0 where none is.
      partner: column of the rejected sequence.
    """

    present: Bool[Array, "B S"]
    weight: Float[Array, "B S"]
    partner: Int[Array, "B S"]

    def split(self, values: Shaped[Array, "B S"]) -> tuple[Shaped[Array, "B S"], Shaped[Array, "B S"]]:
        """The values of chosen and rejected sequences; 0 where no pair is."""
        rejected = jnp.take_along_axis(values, self.partner, axis=1)
        return jnp.where(self.present, values, 0), jnp.where(self.present, rejected, 0)


def pairs_of(batch: Batch) -> Pairs:
    """The pairs that `side` describes (keys `pair_id`, `chosen`, `weight`)."""
    ids, chosen = batch.side["pair_id"], batch.side["chosen"]
    partners = (ids[:, :, None] == ids[:, None, :]) & (chosen[:, None, :] == 0)
    present = (chosen == 1) & (ids >= 0) & (batch.side["weight"] != 0)
    return Pairs(present, jnp.where(present, batch.side["weight"], 0), jnp.argmax(partners, axis=-1))


def count_pairs(batch: Batch) -> int:
    """Complete pairs in a batch of numpy arrays.

    Raises:
      ValueError: a pair that is not one chosen and one rejected sequence in the same row.
    """
    ids, chosen = np.asarray(batch.side["pair_id"]), np.asarray(batch.side["chosen"])
    count = 0
    for row, (row_ids, row_chosen) in enumerate(zip(ids, chosen)):
        for pair in np.unique(row_ids[row_ids >= 0]):
            members = sorted(row_chosen[row_ids == pair].tolist())
            if members != [0, 1]:
                raise ValueError(
                    f"pair {pair} of row {row}: expected one chosen (1) and one rejected (0) sequence in the row, got "
                    f"{members}; pack the two sequences of a pair as one item"
                )
            count += 1
    return count


def weigh_pairs(batch: Batch, *, total: int | None = None) -> Batch:
    """The batch with `side["weight"]` = 1 / pairs on every member of a pair, on the host: a mean over pairs.

    Args:
      batch: numpy arrays.
      total: pairs of the global batch, where this is a part of it.

    Raises:
      ValueError: see `count_pairs`.
    """
    count = count_pairs(batch)
    weight = (np.asarray(batch.side["pair_id"]) >= 0) / max(count if total is None else total, 1)
    return dataclasses.replace(batch, side={**batch.side, "weight": weight.astype(np.float32)})
