"""Which blocks of keys each block of queries needs: computed once a step, used by every layer, forward and backward.

A row of 8 blocks holding three documents, causal: `#` is computed with a mask, `@` without, `.` costs nothing::

    document   1 1 1 1 2 2 2 3
             1 # . . . . . . .
             1 @ # . . . . . .
             1 @ @ # . . . . .
             1 # # # # . . . .    the last block of document 1 also holds the first tokens of document 2
             2 . . . # # . . .
             2 . . . # @ # . .
             2 . . . # # # # .
             3 . . . . . . # #

The plan looks only at the smallest and largest segment id and position of each block, so what it skips is never
visible, whatever the ids; ids that come in order (a packed row) make it tight.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dqjax.kernels.attention.mask import Tokens, pad_tokens


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kv_start", "kv_end", "q_major", "kv_major", "steps"),
    meta_fields=("block_q", "block_kv", "length_q", "length_kv", "causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """The needed blocks of a batch of rows; a pytree whose arrays lead with B and are sharded like the batch.

    jax rebuilds pytrees round placeholders, so the fields that hold arrays cannot name their types.

    Attributes:
      kv_start, kv_end: [B, I] int32; block i of the queries needs no key block outside kv_start[i] <= j < kv_end[i].
      q_major: [B, P] int32, the needed pairs (i, j) as `pack_steps` writes them, i slow and j fast, `steps[b, 0]` of
        them. A block i that needs nothing has one step that computes nothing, so that its output is written.
      kv_major: [B, P] int32, the same pairs, j slow and i fast, `steps[b, 1]` of them.
      steps: [B, 2] int32.
      block_q, block_kv: tokens in a block.
      length_q, length_kv: tokens in a row; the last block may hang over.
      causal, window: the mask that the plan was made for.
    """

    kv_start: Any
    kv_end: Any
    q_major: Any
    kv_major: Any
    steps: Any
    block_q: int
    block_kv: int
    length_q: int
    length_kv: int
    causal: bool
    window: int | None

    @property
    def blocks_q(self) -> int:
        return -(-self.length_q // self.block_q)

    @property
    def blocks_kv(self) -> int:
        return -(-self.length_kv // self.block_kv)


class Step(NamedTuple):
    """One pair of blocks in the order of work.

    Attributes:
      i, j: block of queries, block of keys.
      first, last: whether the slow block begins, and ends, with this step.
      compute: whether there is anything visible.
      whole: whether every query sees every key: no mask needed.
    """

    i: Any
    j: Any
    first: Any
    last: Any
    compute: Any
    whole: Any


_BITS = 14
MOST_BLOCKS = 2**_BITS
"""A step is one 32-bit word: two block numbers and four flags."""


def pack_step(step: Step) -> Int[Array, "..."]:
    """A step in one int32, as kernels read it from scalar memory."""
    flags = step.first | step.last << 1 | step.compute << 2 | step.whole << 3
    return (flags | step.i << 4 | step.j << (4 + _BITS)).astype(jnp.int32)


def unpack_step(word: Any) -> Step:
    """The inverse of `pack_step`; works on scalars inside kernels and index maps."""
    mask = MOST_BLOCKS - 1
    flags = (word >> bit & 1 for bit in range(4))
    return Step(word >> 4 & mask, word >> (4 + _BITS) & mask, *flags)


@functools.partial(jax.jit, static_argnames=("causal", "window", "block_q", "block_kv", "in_order"))
def build_plan(
    tokens: Tokens, *, causal: bool, window: int | None, block_q: int, block_kv: int, in_order: bool
) -> Plan:
    """The plan of `tokens` for blocks of `block_q` queries and `block_kv` keys.

    Args:
      in_order: positions count along both rows, which bounds the causal pairs and halves the size of the lists.
    """
    length_q, length_kv = tokens.q_segment_ids.shape[1], tokens.kv_segment_ids.shape[1]
    blocks_q, blocks_kv = -(-length_q // block_q), -(-length_kv // block_kv)
    if max(blocks_q, blocks_kv) > MOST_BLOCKS:
        raise ValueError(
            f"attention: at most {MOST_BLOCKS} blocks a row, got {blocks_q} and {blocks_kv}; take larger blocks"
        )
    active, whole = _needed_blocks(tokens, causal, window, block_q, block_kv)
    some = jnp.any(active, axis=-1)
    first = jnp.argmax(active, axis=-1)
    last = blocks_kv - jnp.argmax(active[..., ::-1], axis=-1)
    reach = [min(blocks_kv, -(-min((i + 1) * block_q, length_q) // block_kv)) for i in range(blocks_q)]
    pairs = sum(reach) if causal and in_order else blocks_q * blocks_kv
    q_major, q_steps = _list_steps(active, whole, pairs, transposed=False)
    kv_major, kv_steps = _list_steps(active.swapaxes(1, 2), whole.swapaxes(1, 2), pairs + blocks_kv, transposed=True)
    return Plan(
        kv_start=jnp.where(some, first, 0).astype(jnp.int32),
        kv_end=jnp.where(some, last, 0).astype(jnp.int32),
        q_major=q_major,
        kv_major=kv_major,
        steps=jnp.stack([q_steps, kv_steps], axis=1),
        block_q=block_q,
        block_kv=block_kv,
        length_q=length_q,
        length_kv=length_kv,
        causal=causal,
        window=window,
    )


def _list_steps(
    active: Bool[Array, "B I J"], whole: Bool[Array, "B I J"], capacity: int, transposed: bool
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """The active pairs in row-major order as packed steps, and their number; past it the last step repeats, idle."""
    J = active.shape[-1]
    idle = ~jnp.any(active, axis=-1, keepdims=True) & (jnp.arange(J) == 0)
    listed = (active | idle).reshape(len(active), -1)
    steps = jnp.sum(listed, axis=1, dtype=jnp.int32)
    at = jax.vmap(lambda row: jnp.flatnonzero(row, size=capacity, fill_value=0))(listed).astype(jnp.int32)
    n = jnp.arange(capacity)
    at = jnp.where(n < steps[:, None], at, jnp.take_along_axis(at, steps[:, None] - 1, axis=1))
    slow = at // J
    real = n < steps[:, None]
    first = real & ((n == 0) | (slow != jnp.roll(slow, 1, axis=1)))
    last = real & ((n == steps[:, None] - 1) | (slow != jnp.roll(slow, -1, axis=1)))
    compute, unmasked = (
        real & jnp.take_along_axis(x.reshape(len(x), -1), at, axis=1) for x in (active, whole)
    )
    i, j = (at % J, slow) if transposed else (slow, at % J)
    return pack_step(Step(i, j, *(flag.astype(jnp.int32) for flag in (first, last, compute, unmasked)))), steps


def _needed_blocks(
    tokens: Tokens, causal: bool, window: int | None, block_q: int, block_kv: int
) -> tuple[Bool[Array, "B I J"], Bool[Array, "B I J"]]:
    """Where a query of block i may see a key of block j, and where every query sees every key."""
    blocks_q = -(-tokens.q_segment_ids.shape[1] // block_q)
    blocks_kv = -(-tokens.kv_segment_ids.shape[1] // block_kv)
    tokens = pad_tokens(tokens, blocks_q * block_q, blocks_kv * block_kv)
    q = _Bounds(*(x[:, :, None] for x in _bounds(tokens.q_segment_ids, tokens.q_positions, block_q)))
    kv = _Bounds(*(x[:, None, :] for x in _bounds(tokens.kv_segment_ids, tokens.kv_positions, block_kv)))
    active = (q.low <= kv.high) & (kv.low <= q.high)
    whole = q.full & kv.full & (q.low == q.high) & (kv.low == kv.high) & (q.low == kv.low)
    if causal:
        active &= q.last >= kv.first
        whole &= q.first >= kv.last
    if window is not None:
        active &= q.first - kv.last < window
        whole &= q.last - kv.first < window
        if not causal:
            active &= kv.first - q.last < window
            whole &= kv.last - q.first < window
    return active, whole


class _Bounds(NamedTuple):
    """Of a block's tokens, padding left out: the range of segment ids and positions; and whether none is padding.

    A block of padding alone gets ranges that meet no other's (low > high).
    """

    low: Int[Array, "..."]
    high: Int[Array, "..."]
    first: Int[Array, "..."]
    last: Int[Array, "..."]
    full: Bool[Array, "..."]


def _bounds(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], block: int) -> _Bounds:
    B, T = segment_ids.shape
    segment_ids, positions = (x.reshape(B, T // block, block) for x in (segment_ids, positions))
    real = segment_ids != 0
    large = jnp.iinfo(jnp.int32).max // 2  # halved: differences of two bounds must not overflow

    def low(x):
        return jnp.min(jnp.where(real, x, large), axis=-1)

    def high(x):
        return jnp.max(jnp.where(real, x, -large), axis=-1)

    return _Bounds(low(segment_ids), high(segment_ids), low(positions), high(positions), jnp.all(real, axis=-1))
