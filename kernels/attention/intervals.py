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
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dqjax.kernels.attention.mask import Tokens

TILE = 128
"""Queries of a tile in the forward and dq kernels, keys of one in the dk, dv kernel."""

PART = TILE // 2
"""What a warpgroup owns of a tile; queries of a tile that two warpgroups share by heads."""

STEP_KV, STEP_Q = 128, 64
"""Keys that a tile of queries takes in a step, queries that a tile of keys takes."""

ALIGNED = 8
"""Copies to shared memory start at a multiple of this many tokens."""

OUT_OF_ORDER = -1
"""`lower` of every query of a row whose documents are out of order: the kernels give NaN there."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("lower", "upper", "q_tiles", "q_parts", "kv_tiles"),
    meta_fields=("length_q", "length_kv", "causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class IntervalPlan:
    """The intervals of a batch of rows; a pytree whose arrays lead with B and are sharded like the batch.

    A tile's work is `steps` blocks of the other side, the first at token `start * ALIGNED`. A part of the tile needs those
    from `begin` to before `end`. Of these, steps below `lower_to` need a mask for one end of the intervals, steps from
    `upper_from` on for the other. Tiles are listed by falling work, so that the last ones to run are short.

    Attributes:
      lower, upper: [B, T'] int32 with T' whole tiles; both 0 where a query sees nothing.
      q_tiles: [B, T' / TILE, 11] int32: tile of queries, start, steps of STEP_KV keys; begin, lower_to, upper_from and
        end of its first half, then of its second.
      q_parts: [B, T' / PART, 7] int32: the same of tiles of PART queries, for warpgroups that take a head each.
      kv_tiles: [B, S' / TILE, 11] int32: tile of keys, start, steps of STEP_Q queries; the four of each half.
      length_q, length_kv: tokens in a row.
      causal, window: the mask that the plan was made for.
    """

    lower: Any
    upper: Any
    q_tiles: Any
    q_parts: Any
    kv_tiles: Any
    length_q: int
    length_kv: int
    causal: bool
    window: int | None


@functools.partial(jax.jit, static_argnames=("causal", "window", "shared"))
def build_intervals(tokens: Tokens, *, causal: bool, window: int | None, shared: bool) -> IntervalPlan:
    """The plan of `tokens`, whose kv_positions count along the row.

    With `shared`, queries and keys are the same tokens and no positions are given, which takes less work.

    Rows whose segment ids fall somewhere, whose padding lies between documents, or whose queries' intervals move
    backwards cannot be told in intervals: they are marked `OUT_OF_ORDER`.
    """
    T, S = tokens.q_segment_ids.shape[1], tokens.kv_segment_ids.shape[1]
    lower, upper, in_order = _intervals(tokens, causal, window, shared)
    t, s = (-(-length // TILE) * TILE for length in (T, S))
    lower, upper = (jnp.pad(x, ((0, 0), (0, t - T))) for x in (lower, upper))
    q_tiles, q_parts = (_tiles_of_queries(lower, upper, s, parts) for parts in (2, 1))
    kv_tiles = _tiles_of_keys(lower, upper, s)
    lower = jnp.where(in_order[:, None], lower, OUT_OF_ORDER)
    return IntervalPlan(lower, upper, q_tiles, q_parts, kv_tiles, T, S, causal, window)


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
    tokens: Tokens, causal: bool, window: int | None, shared: bool
) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Bool[Array, "B"]]:
    """lower, upper, and whether a row's intervals say what its segment ids and positions do."""
    q_segments, kv_segments, q_positions = tokens.q_segment_ids, tokens.kv_segment_ids, tokens.q_positions
    disorder = _disorder(q_segments)
    if shared:
        lower, upper = _documents(q_segments)
    else:
        lower = jnp.sum(kv_segments[:, None, :] < q_segments[:, :, None], axis=2)
        upper = lower + jnp.sum(kv_segments[:, None, :] == q_segments[:, :, None], axis=2)
        # Padding behind the documents counts as smaller than they are; only padding before them is.
        padding = jnp.sum(jnp.cumprod(kv_segments == 0, axis=1), axis=1) - jnp.sum(kv_segments == 0, axis=1)
        lower, upper = lower + padding[:, None], upper + padding[:, None]
    if causal:
        upper = jnp.minimum(upper, q_positions + 1)
    elif window is not None:
        upper = jnp.minimum(upper, q_positions + window)
    if window is not None:
        lower = jnp.maximum(lower, q_positions - window + 1)
    some = (q_segments != 0) & (lower < upper)
    both = some[:, 1:] & some[:, :-1]
    back = both & ((jnp.diff(lower, axis=1) < 0) | (jnp.diff(upper, axis=1) < 0))
    in_order = _no(disorder + jnp.pad(2 * back, ((0, 0), (1, 0))))
    if not shared:
        in_order &= _no(_disorder(kv_segments))
    return (*(jnp.where(some, x, 0).astype(jnp.int32) for x in (lower, upper)), in_order)


def _disorder(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Adds up to less than 2 along a row whose documents rise, with padding before and behind them only.

    Padding begins or ends once, and once more for a row that begins with it.
    """
    left, right = segment_ids[:, :-1], segment_ids[:, 1:]
    changes = ((left == 0) != (right == 0)) + 2 * ((left > right) & (right != 0))
    return jnp.concatenate([-(segment_ids[:, :1] == 0).astype(jnp.int32), changes], axis=1)


def _no(disorder: Int[Array, "B T"]) -> Bool[Array, "B"]:
    bounded = jnp.minimum(jnp.sum(_in_tiles(disorder), axis=2), 3)  # else XLA makes one sum of both, and three passes
    return jnp.sum(bounded, axis=1) < 2


def _in_tiles(x: Int[Array, "B T"], fill: int = 0) -> Int[Array, "B I TILE"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE)), constant_values=fill).reshape(len(x), -1, TILE)


def _documents(segment_ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """First token of each token's document, and the first behind it: within tiles and over them."""
    B, T = segment_ids.shape
    at = jnp.arange(T)
    differ = jnp.diff(segment_ids, axis=1) != 0
    begins = _in_tiles(jnp.where(jnp.pad(differ, ((0, 0), (1, 0))), at, 0))
    ends = _in_tiles(jnp.where(jnp.pad(differ, ((0, 0), (0, 1))), at + 1, T), T)
    tiles, here = jnp.arange(begins.shape[1]), jnp.arange(TILE)

    def search(x, reduce, upto, before, fill):
        """Over a token's tile up to itself and the tiles before that; `upto` and `before` turn it round."""
        mine = jnp.where(upto(here[None, :], here[:, None]), x[:, :, None, :], fill)
        others = jnp.where(before(tiles[None, :], tiles[:, None]), reduce(x, axis=2)[:, None, :], fill)
        others = jnp.broadcast_to(others[:, :, None, :], (*x.shape, len(tiles)))
        return reduce(jnp.concatenate([mine, others], axis=3), axis=3).reshape(B, -1)[:, :T]

    lower = search(begins, jnp.max, operator.le, operator.lt, 0)
    return lower, search(ends, jnp.min, operator.ge, operator.gt, T)


def _tiles_of_queries(
    lower: Int[Array, "B T"], upper: Int[Array, "B T"], length_kv: int, parts: int
) -> Int[Array, "B I C"]:
    lower, upper = (x.reshape(len(lower), -1, parts, PART) for x in (lower, upper))
    first = jnp.min(jnp.where(lower < upper, lower, length_kv), axis=3)
    end = jnp.max(upper, axis=3)
    return _listed(first, end, jnp.max(lower, axis=3), jnp.min(upper, axis=3), STEP_KV, length_kv, at_end=True)


def _tiles_of_keys(lower: Int[Array, "B T"], upper: Int[Array, "B T"], length_kv: int) -> Int[Array, "B J 11"]:
    """Intervals rise along the row, so that the bounds of a part lie where one value passes another."""
    B, T = lower.shape
    from_ = jnp.arange(0, length_kv, PART)
    # The first query whose upper is larger than x, and the last whose lower is less: turned round, the first, too.
    turned = jnp.where(lower < upper, length_kv - lower, 0)[:, ::-1]
    rising = jnp.stack([upper, turned], axis=1).reshape(B, 2, 1, -1, PART)
    beyond = jnp.concatenate([from_, from_ + PART - 1, length_kv - from_ - PART, length_kv - from_ - 1])
    beyond = beyond.reshape(2, -1, 1)
    numbers = jnp.arange(T // PART)
    part = jnp.min(jnp.where(jnp.max(rising, axis=4) > beyond, numbers, T // PART), axis=3)
    inside = jnp.take_along_axis(rising, part[..., None, None], axis=3, mode="clip")
    inside = inside[..., 0, :] > beyond
    first = jnp.min(jnp.where(inside, part[..., None] * PART + jnp.arange(PART), T), axis=3)
    first, turned = jnp.moveaxis(first.reshape(B, 2, 2, -1, 2), 1, 0)
    return _listed(first[:, 0], T - turned[:, 0], first[:, 1], T - turned[:, 1], STEP_Q, T, at_end=False)


def _listed(first, end, whole_first, whole_end, size: int, length: int, at_end: bool) -> Int[Array, "B I C"]:
    """The work of tiles by falling number of steps; [B, I, P] `first` <= x < `end` are the tokens that their parts need.

    Steps are laid out from the end that causality cuts, so that its edge falls into as few of them as it can: the last
    one ends at the last token needed or the first begins at the first. All lie inside the row.
    """
    tile_first = jnp.min(first, axis=2) // ALIGNED * ALIGNED
    tile_end = -(-jnp.max(end, axis=2) // ALIGNED) * ALIGNED
    steps = jnp.maximum(-(-(tile_end - tile_first) // size), 0)
    start = jnp.clip(tile_end - steps * size if at_end else tile_first, 0, length - steps * size)
    origin, most = start[..., None], steps[..., None]
    begin = jnp.clip((first - origin) // size, 0, most)
    finish = jnp.clip(-(-(end - origin) // size), begin, most)
    lower_to = jnp.clip(-(-(whole_first - origin) // size), begin, finish)
    upper_from = jnp.clip((whole_end - origin) // size, begin, finish)
    tile = jnp.broadcast_to(jnp.arange(steps.shape[1]), steps.shape)
    parts = jnp.stack([begin, lower_to, upper_from, finish], axis=-1).reshape(*steps.shape, -1)
    table = jnp.concatenate([jnp.stack([tile, start // ALIGNED, steps], axis=-1), parts], axis=-1)
    # A sort would take longer than the attention of a short row: each tile counts those before it, in one fused pass.
    mine, other = (steps[:, :, None], tile[:, :, None]), (steps[:, None, :], tile[:, None, :])
    place = jnp.sum((other[0] > mine[0]) | ((other[0] == mine[0]) & (other[1] < mine[1])), axis=2)
    chosen = place[:, :, None] == tile[:, None, :]
    return jnp.sum(jnp.where(chosen[..., None], table[:, :, None], 0), axis=1).astype(jnp.int32)
