"""The plan of the Hopper kernels: the interval of keys that each query sees, and what it means for tiles of the row.

In a packed row whose documents come in order, causal or windowed, a query sees the keys lower <= s < upper and no
others, so two numbers a query replace segment ids and positions, and a mask costs two comparisons with a column's
number::

    document   1 1 1 2 2 3        lower  upper
             1 # . . . . .          0      1
             1 # # . . . .          0      2
             1 # # # . . .          0      3
             2 . . . # . .          3      4
             2 . . . # # .          3      5
             3 . . . . . #          5      6
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dqjax.kernels.attention.mask import Tokens

TILE = 128
"""Queries of a tile in the forward and dq kernels, keys of one in the dk, dv kernel."""

STEP_KV, STEP_Q = 128, 64
"""Keys that a tile of queries takes in a step, queries that a tile of keys takes."""

ALIGNED = 8
"""Copies to shared memory start at a multiple of this many tokens."""

OUT_OF_ORDER = -1
"""`lower` of every query of a row whose documents are out of order: the kernels give NaN there."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lower", "upper", "q_tiles", "kv_tiles"),
    meta_fields=("length_q", "length_kv", "causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class IntervalPlan:
    """The intervals of a batch of rows; a pytree whose arrays lead with B and are sharded like the batch.

    A tile's work is `steps` blocks of the other side, the first at token `start`; those of `whole_from <= step <
    whole_to` need no mask. Tiles are listed by falling work, so that the last ones to run are short.

    Attributes:
      lower, upper: [B, T'] int32 with T' whole tiles; both 0 where a query sees nothing.
      q_tiles: [B, T' / TILE, 5] int32: tile of queries, start, steps of STEP_KV keys, whole_from, whole_to.
      kv_tiles: [B, S' / TILE, 5] int32: tile of keys, start, steps of STEP_Q queries, whole_from, whole_to.
      length_q, length_kv: tokens in a row.
      causal, window: the mask that the plan was made for.
    """

    lower: Any
    upper: Any
    q_tiles: Any
    kv_tiles: Any
    length_q: int
    length_kv: int
    causal: bool
    window: int | None


@functools.partial(jax.jit, static_argnames=("causal", "window"))
def build_intervals(tokens: Tokens, *, causal: bool, window: int | None) -> IntervalPlan:
    """The plan of `tokens`, whose kv_positions count along the row.

    Rows whose segment ids fall somewhere, whose padding lies between documents, or whose queries' intervals move
    backwards cannot be told in intervals: they are marked `OUT_OF_ORDER`.
    """
    T, S = tokens.q_segment_ids.shape[1], tokens.kv_segment_ids.shape[1]
    lower, upper, in_order = _intervals(tokens, causal, window)
    t, s = (-(-length // TILE) * TILE for length in (T, S))
    lower, upper = (jnp.pad(x, ((0, 0), (0, t - T))) for x in (lower, upper))
    q_tiles, kv_tiles = _tiles_of_queries(lower, upper, s), _tiles_of_keys(lower, upper, s)
    lower = jnp.where(in_order[:, None], lower, OUT_OF_ORDER)
    return IntervalPlan(lower, upper, q_tiles, kv_tiles, T, S, causal, window)


def check_order(plan: IntervalPlan) -> None:
    """Raises ValueError where a row of a plan that is not traced is out of order."""
    if isinstance(plan.lower, jax.core.Tracer):
        return
    rows = jnp.flatnonzero(jnp.any(plan.lower == OUT_OF_ORDER, axis=1))
    if len(rows):
        raise ValueError(
            "attention: 'mosaic_gpu' needs documents in order along the row (segment ids that do not fall) and padding at "
            f"its ends only; rows {rows.tolist()} have another order: sort them, or use backend 'xla'"
        )


def _intervals(
    tokens: Tokens, causal: bool, window: int | None
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B"]]:
    q_segments, q_positions = tokens.q_segment_ids, tokens.q_positions
    kv_segments = tokens.kv_segment_ids
    begun = jax.lax.cummax(kv_segments, axis=1) > 0
    kv_segments = jnp.where(kv_segments != 0, kv_segments, jnp.where(begun, jnp.iinfo(jnp.int32).max, 0))

    def place(side):
        return jax.vmap(functools.partial(jnp.searchsorted, side=side))(kv_segments, q_segments).astype(jnp.int32)

    lower, upper = place("left"), place("right")
    if causal:
        upper = jnp.minimum(upper, q_positions + 1)
    elif window is not None:
        upper = jnp.minimum(upper, q_positions + window)
    if window is not None:
        lower = jnp.maximum(lower, q_positions - window + 1)
    some = (q_segments != 0) & (lower < upper)
    running = jax.lax.cummax(jnp.where(some, lower, 0), axis=1), jax.lax.cummax(jnp.where(some, upper, 0), axis=1)
    in_order = jnp.all(jnp.diff(kv_segments, axis=1) >= 0, axis=1)
    in_order &= jnp.all(~some | ((lower == running[0]) & (upper == running[1])), axis=1)
    return jnp.where(some, lower, 0), jnp.where(some, upper, 0), in_order


def _tiles_of_queries(lower: Int[Array, "B T"], upper: Int[Array, "B T"], length_kv: int) -> Int[Array, "B I 5"]:
    B = len(lower)
    lower, upper = (x.reshape(B, -1, TILE) for x in (lower, upper))
    some = lower < upper
    first = jnp.min(jnp.where(some, lower, length_kv), axis=2)
    end = jnp.max(upper, axis=2)
    return _listed(first, end, jnp.max(lower, axis=2), jnp.min(upper, axis=2), STEP_KV, length_kv)


def _tiles_of_keys(lower: Int[Array, "B T"], upper: Int[Array, "B T"], length_kv: int) -> Int[Array, "B J 5"]:
    T = lower.shape[1]
    from_ = jnp.arange(0, length_kv, TILE)
    lower, upper, at = lower[:, :, None], upper[:, :, None], jnp.arange(T)[:, None]
    some = (lower < upper) & (lower < from_ + TILE) & (upper > from_)
    whole = (lower <= from_) & (upper >= from_ + TILE)

    def first(x):
        return jnp.min(jnp.where(x, at, T), axis=1)

    def end(x):
        return jnp.max(jnp.where(x, at + 1, 0), axis=1)

    return _listed(first(some), end(some), first(whole), end(whole), STEP_Q, T)


def _listed(first, end, whole_first, whole_end, size: int, length: int) -> Int[Array, "B I 5"]:
    """The work of tiles that need the tokens first <= x < end in steps of `size`, by falling number of steps.

    The steps lie inside the row: the last ones of it start earlier rather than hang over.
    """
    first = first // ALIGNED * ALIGNED
    steps = jnp.maximum(-(-(end - first) // size), 0)
    start = jnp.clip(first, 0, length - steps * size)
    whole_from = jnp.clip(-(-(whole_first - start) // size), 0, steps)
    whole_to = jnp.clip((whole_end - start) // size, whole_from, steps)
    order = jnp.argsort(-steps, axis=1, stable=True)
    table = jnp.stack([jnp.zeros_like(steps) + jnp.arange(steps.shape[1]), start, steps, whole_from, whole_to], axis=-1)
    return jnp.take_along_axis(table, order[:, :, None], axis=1).astype(jnp.int32)
