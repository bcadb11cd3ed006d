"""Sums over the sequences of packed rows, and the weights that make a weighted sum of tokens the wanted mean.

A loss is `Σ token_weight · ℓ`; the reduction lives in `token_weight` alone. `weigh_tokens` computes it on the host,
once, over the global batch, so neither micro-batches nor packing nor the mesh can change it. With m = 1 on
trained tokens::

    token_mean     m / N                 N = Σ m over the global batch         SFT; dapo, bnpo, cispo
    sequence_mean  m / (n_s · B)         n_s = Σ m of the sequence, B sequences     grpo, sapo
    fixed_length   m / (L · B)           L = the longest completion allowed         dr_grpo
    sum            m                                                                preference sums

B counts every sequence, a wholly masked one too: it stays in the mean, as a row of a padded batch does.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dqjax.types import Batch

Reduction = Literal["token_mean", "sequence_mean", "fixed_length", "sum"]


def sequence_sums(
    x: Float[Array, "B T"], sequence_index: Int[Array, "B T"], columns: int
) -> Float[Array, "B {columns}"]:
    """Σ of `x` over the tokens of each sequence; tokens whose index is `columns` or more belong to none."""
    return jax.vmap(lambda x, index: jax.ops.segment_sum(x, index, columns))(x, sequence_index)


def on_tokens(
    values: Shaped[Array, "B S"], sequence_index: Int[Array, "B T"], fill: float = 0.0
) -> Shaped[Array, "B T"]:
    """Each token's value of its sequence; `fill` for tokens of none."""
    return jnp.take_along_axis(values, sequence_index, axis=1, mode="fill", fill_value=fill)


class Totals(NamedTuple):
    """What a mean divides by, over the *global* batch; those of several hosts or parts add up.

    Attributes:
      tokens: trained tokens.
      sequences: sequences, with or without trained tokens.
    """

    tokens: float
    sequences: float


def totals_of(batch: Batch) -> Totals:
    """Counts of a batch of numpy arrays. A token is trained where `token_weight` is not 0."""
    index, real = np.asarray(batch.sequence_index), np.asarray(batch.segment_ids) > 0
    width = int(index.max(initial=0)) + 1
    sequences = np.unique((np.arange(len(index))[:, None] * width + index)[real])
    return Totals(float(np.count_nonzero(batch.token_weight)), float(len(sequences)))


def weigh_tokens(
    batch: Batch, reduction: Reduction, *, totals: Totals | None = None, length: int | None = None
) -> Batch:
    """The batch with the `token_weight` of a reduction (the table above), on the host.

    Args:
      batch: numpy arrays; `token_weight` is not 0 on the tokens to train.
      totals: of the global batch, where this is a part of it.
      length: L of `fixed_length`, tokens.

    Raises:
      ValueError: `fixed_length` without a positive length.
    """
    mask = (np.asarray(batch.token_weight) != 0).astype(np.float64)
    totals = totals_of(batch) if totals is None else totals
    tokens, sequences = max(totals.tokens, 1.0), max(totals.sequences, 1.0)
    match reduction:
        case "token_mean":
            weight = mask / tokens
        case "sequence_mean":
            weight = mask / (_lengths_on_tokens(mask, np.asarray(batch.sequence_index)) * sequences)
        case "fixed_length":
            if length is None or length < 1:
                raise ValueError(f"fixed_length divides by the longest completion; expected length >= 1, got {length}")
            weight = mask / (length * sequences)
        case "sum":
            weight = mask
    return dataclasses.replace(batch, token_weight=weight.astype(np.float32))


def mask_sequences(batch: Batch, drop: Bool[np.ndarray, "B S"]) -> Batch:
    """The batch with no trained token in the sequences that `drop` marks (truncated completions), on the host."""
    index = np.asarray(batch.sequence_index)
    padded = np.pad(drop, ((0, 0), (0, 1)))  # tokens of no sequence have an index of S or more
    dropped = np.take_along_axis(padded, np.minimum(index, drop.shape[1]), axis=1)
    return dataclasses.replace(batch, token_weight=np.where(dropped, 0, batch.token_weight).astype(np.float32))


def _lengths_on_tokens(mask: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Trained tokens of each token's sequence, at least 1; [B, T]."""
    lengths = np.zeros((len(index), int(index.max(initial=0)) + 1))
    np.add.at(lengths, (np.arange(len(index))[:, None], index), mask)
    return np.maximum(np.take_along_axis(lengths, index, axis=1), 1)
