"""Decode attention on TPU: one Pallas kernel that streams the cache through, in its own layout.

The grid is (sequence, block of slots). Lengths are read from scalar memory before a step begins; blocks past a
sequence's length, or before its window, are neither fetched nor computed. A block [slots, K, H] is seen as a matrix [slots · K, H]
(no data moves), and all query heads share one product with it; of the logits, each head keeps its own columns::

    slot              0     1     2
    kv head         0   1 0   1 0   1
    query head 0    #   . #   . #   .
    query head 1    .   # .   # .   #

That is K times the arithmetic and still less than the fetch: decoding waits for memory.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.mask import Variant
from dqjax.kernels.tuning.lookup import Problem, chosen
from dqjax.kernels.varying import typed_shape, varying_axes

BLOCK_BYTES = 2**20
"""Of keys fetched at once; as many of values, and each twice, for the fetch ahead."""
LEAST_SLOTS = 16
MASKED = -1e30


def tpu_decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "P S K H"],
    v_cache: Float[Array, "P S K H"],
    lengths: Int[Array, "B"],
    variant: Variant,
    pages: Int[Array, "B n"] | None = None,
) -> Float[Array, "B N H"]:
    """As the reference, with the weights rounded to the cache's dtype; slots past `lengths` must be finite.

    A page is a whole number of blocks, which the grid's index map finds through the table; all its numbers are pages.
    """
    B, N, H = q.shape
    S, K = k_cache.shape[1:3]
    problem = Problem("decode_attention", "tpu", k_cache.dtype.name, H, N // K, B * K, S)
    slots = chosen(problem, *_slots_in_block(S, K * H * k_cache.dtype.itemsize))
    lengths = lengths.astype(jnp.int32)
    first = jnp.zeros_like(lengths) if variant.window is None else jnp.maximum(lengths - variant.window, 0) // slots
    blocks = jnp.maximum(-(-lengths // slots) - first, 1)  # one idle step for an empty sequence, to write its zeros

    def cache_index(b, s, lengths, first, blocks, *table):
        block = first[b] + jnp.minimum(s, blocks[b] - 1)
        if pages is None:
            return b, block, 0, 0
        a_page = jnp.int32(S // slots)
        return table[0][b * pages.shape[1] + lax.div(block, a_page)], lax.rem(block, a_page), 0, 0

    def query_index(b, s, *_):
        return b, 0, 0

    tables = () if pages is None else (pages.reshape(-1),)

    def kernel(lengths, first, blocks, *refs):
        _kernel(slots, K, variant, lengths, first, blocks, *refs[len(tables) :])

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 + len(tables),
            grid=(B, jnp.max(blocks)),
            in_specs=[
                pl.BlockSpec((1, N, H), query_index),
                pl.BlockSpec((1, slots, K, H), cache_index),
                pl.BlockSpec((1, slots, K, H), cache_index),
            ],
            out_specs=pl.BlockSpec((1, N, H), query_index),
            scratch_shapes=[
                pltpu.VMEM((N, 1), jnp.float32),
                pltpu.VMEM((N, 1), jnp.float32),
                pltpu.VMEM((N, H), jnp.float32),
            ],
        ),
        out_shape=typed_shape((B, N, H), q.dtype, varying_axes((q, k_cache, v_cache, lengths, tables))),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * N * k_cache.size,
            transcendentals=N * k_cache.size // H,
            bytes_accessed=2 * k_cache.size * k_cache.dtype.itemsize + 2 * q.size * q.dtype.itemsize,
        ),
        name="decode_attention",
    )(lengths, first, blocks, *tables, q, k_cache, v_cache)


def _kernel(slots, heads, variant, lengths, first, blocks, q, k, v, out, peak, total, acc):
    b, s = pl.program_id(0), pl.program_id(1)
    length = lengths[b]

    @pl.when(s == 0)
    def _():
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    @pl.when((s < blocks[b]) & (length > 0))
    def _():
        N, H = acc.shape
        logits = variant.scale * _product(q[0], k[0].reshape(slots * heads, H), "NH,CH->NC")
        if variant.softcap is not None:
            logits = variant.softcap * jnp.tanh(logits / variant.softcap)
        row = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        column = lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        # div and rem of non-negative numbers: // and % would also ask for signs.
        slot = (first[b] + s) * slots + lax.div(column, jnp.int32(heads))
        see = (lax.rem(column, jnp.int32(heads)) == lax.div(row, jnp.int32(N // heads))) & (slot < length)
        if variant.window is not None:
            see &= slot >= length - variant.window
        logits = jnp.where(see, logits, MASKED)
        new_peak = jnp.maximum(peak[...], jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.where(see, jnp.exp(logits - new_peak), 0)
        shrink = jnp.exp(peak[...] - new_peak)
        total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        acc[...] = acc[...] * shrink + _product(weights.astype(v.dtype), v[0].reshape(slots * heads, H), "NC,CH->NH")
        peak[...] = new_peak

    @pl.when(s == pl.num_programs(1) - 1)
    def _():
        out[0] = (acc[...] / jnp.where(total[...] > 0, total[...], 1)).astype(out.dtype)


def _product(a: Any, b: Any, letters: str) -> Any:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)


def _slots_in_block(capacity: int, bytes_per_slot: int) -> tuple[list[int], int]:
    """The powers of two that divide the cache and fit `BLOCK_BYTES` twice; and the largest that fits it once."""
    divisor = capacity & -capacity
    if divisor < LEAST_SLOTS:
        raise NotImplementedError(
            f"decode_attention: backend 'tpu' needs a cache of whole blocks of {LEAST_SLOTS} slots, got {capacity}"
        )
    sizes = [LEAST_SLOTS << i for i in range((divisor // LEAST_SLOTS).bit_length())]
    sizes = [slots for slots in sizes if slots * bytes_per_slot <= 2 * BLOCK_BYTES] or sizes[:1]
    return sizes, max((slots for slots in sizes if slots * bytes_per_slot <= BLOCK_BYTES), default=sizes[0])
