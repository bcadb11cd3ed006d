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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dqjax.kernels.attention.mask import Tokens, pad_tokens


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("kv_start", "kv_end"),
    meta_fields=("block_q", "block_kv", "length_q", "length_kv", "causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """Block ranges of a batch of rows; a pytree whose arrays lead with B and are sharded like the batch.

    Attributes:
      kv_start, kv_end: [B, I] int32, block i of the queries needs the key blocks kv_start[i] <= j < kv_end[i].
      block_q, block_kv: tokens in a block.
      length_q, length_kv: tokens in a row; the last block may hang over.
      causal, window: the mask that the plan was made for.
    """

    kv_start: Any  # jax rebuilds pytrees round placeholders, so the fields that hold arrays cannot name their types
    kv_end: Any
    block_q: int
    block_kv: int
    length_q: int
    length_kv: int
    causal: bool
    window: int | None


def build_plan(tokens: Tokens, *, causal: bool, window: int | None, block_q: int, block_kv: int) -> Plan:
    """The plan of `tokens` for blocks of `block_q` queries and `block_kv` keys."""
    length_q, length_kv = tokens.q_segment_ids.shape[1], tokens.kv_segment_ids.shape[1]
    active = _active_blocks(tokens, causal, window, block_q, block_kv)
    some = jnp.any(active, axis=-1)
    first = jnp.argmax(active, axis=-1)
    last = active.shape[-1] - jnp.argmax(active[..., ::-1], axis=-1)
    return Plan(
        kv_start=jnp.where(some, first, 0).astype(jnp.int32),
        kv_end=jnp.where(some, last, 0).astype(jnp.int32),
        block_q=block_q,
        block_kv=block_kv,
        length_q=length_q,
        length_kv=length_kv,
        causal=causal,
        window=window,
    )


def _active_blocks(
    tokens: Tokens, causal: bool, window: int | None, block_q: int, block_kv: int
) -> Bool[Array, "B I J"]:
    """False where no query of block i can see a key of block j."""
    blocks_q = -(-tokens.q_segment_ids.shape[1] // block_q)
    blocks_kv = -(-tokens.kv_segment_ids.shape[1] // block_kv)
    tokens = pad_tokens(tokens, blocks_q * block_q, blocks_kv * block_kv)
    q = _bounds(tokens.q_segment_ids, tokens.q_positions, block_q)
    kv = _bounds(tokens.kv_segment_ids, tokens.kv_positions, block_kv)
    q, kv = (x[:, :, None] for x in q), (x[:, None, :] for x in kv)
    q_low, q_high, q_first, q_last = q
    kv_low, kv_high, kv_first, kv_last = kv
    active = (q_low <= kv_high) & (kv_low <= q_high)
    if causal:
        active &= q_last >= kv_first
    if window is not None:
        active &= q_first - kv_last < window
        if not causal:
            active &= kv_first - q_last < window
    return active


def _bounds(segment_ids: Int[Array, "B T"], positions: Int[Array, "B T"], block: int) -> tuple[Int[Array, "B I"], ...]:
    """Smallest and largest segment id and position of each block's tokens, padding left out.

    A block of padding alone gets bounds that meet no other's (low > high).
    """
    B, T = segment_ids.shape
    segment_ids, positions = (x.reshape(B, T // block, block) for x in (segment_ids, positions))
    real = segment_ids != 0
    large = jnp.iinfo(jnp.int32).max // 2  # halved: differences of two bounds must not overflow

    def low(x):
        return jnp.min(jnp.where(real, x, large), axis=-1)

    def high(x):
        return jnp.max(jnp.where(real, x, -large), axis=-1)

    return low(segment_ids), high(segment_ids), low(positions), high(positions)
