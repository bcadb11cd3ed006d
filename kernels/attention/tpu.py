"""Attention on TPU, forward: one Pallas kernel over the plan's list of needed blocks.

The grid is (row, key-value head, step). A step is a pair of blocks out of the plan, read from scalar memory before the
step begins, so blocks of other documents are neither fetched nor computed; the number of steps is that of the longest
list, and shorter lists idle on their last block.

Tiles stand with keys down and queries across, logits[s, t] = k_s · q_t: peak and total of a query are then rows [1, t],
which cost one register a 128 queries, and their reductions run down the sublanes. All query heads of a key-value head
share its tile of keys and values; keys are never expanded. Exponentials are in base 2, with scale · log₂e as a factor.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from dqjax.kernels.attention.mask import MASKED, Tokens, Variant, pad_tokens
from dqjax.kernels.attention.plan import Plan, unpack_step
from dqjax.kernels.varying import typed_shape, varying_axes

LANES = 128
LOG2E = math.log2(math.e)
VMEM_LIMIT = 64 * 2**20
"""A bound, not a reservation: VMEM is 128 MiB on v5e and v6e, 64 on v5p and tpu7x (`pltpu.get_tpu_info`)."""


@functools.partial(jax.jit, static_argnames="variant")  # a bare pallas_call is never pruned from a checkpointed layer
def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    plan: Plan,
    variant: Variant,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Output and lse."""
    call = Call(q, k, tokens, plan, variant)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, call.group, variant),
        grid_spec=call.grid(
            plan.steps[:, 0],
            inputs=[call.queries, call.keys, call.keys, call.query_tokens, call.key_tokens],
            outputs=[call.queries, call.query_scalars],
            scratch=[
                pltpu.VMEM((call.group, plan.block_q), jnp.float32),
                pltpu.VMEM((call.group, plan.block_q), jnp.float32),
                pltpu.VMEM((call.group, call.H, plan.block_q), jnp.float32),
            ],
        ),
        out_shape=[
            call.shape((call.B, call.N, call.T, call.H), q.dtype),
            call.shape((call.B, call.K, call.group, call.T), jnp.float32),
        ],
        compiler_params=PARAMS,
        cost_estimate=call.cost(products=2),
        name="attention_forward",
    )(plan.q_major.reshape(-1), *call.blocks_first([q], [k, v]), *call.token_rows)
    return call.heads_last(out, call.length_q), call.scalars_last(lse)


def _forward_kernel(group, variant, steps, q, k, v, q_tokens, kv_tokens, out, lse, peak, total, acc):
    step = current_step(steps)

    @pl.when(step.first == 1)
    def _():
        peak[...] = jnp.full_like(peak, MASKED)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def tile(see):
        for g in range(group):
            row = slice(g, g + 1)
            logits, _ = logits_of(k[0, 0], q[0, g], variant)
            if see is not None:
                logits = jnp.where(see, logits, MASKED)
            new_peak = jnp.maximum(peak[row, :], jnp.max(logits, axis=0, keepdims=True))
            weights = jnp.exp2(logits - new_peak)
            if see is not None:
                weights = jnp.where(see, weights, 0)  # a query may have seen nothing so far: its peak is MASKED
            shrink = jnp.exp2(peak[row, :] - new_peak)
            total[row, :] = total[row, :] * shrink + jnp.sum(weights, axis=0, keepdims=True)
            acc[g] = acc[g] * shrink + product(v[0, 0], weights.astype(v.dtype), "SH,ST->HT")
            peak[row, :] = new_peak

    on_needed_tile(step, variant, q_tokens, kv_tokens, tile)

    @pl.when(step.last == 1)
    def _():
        some = total[...] > 0
        sums = jnp.where(some, total[...], 1)
        lse[0, 0] = jnp.where(some, peak[...] / LOG2E + jnp.log(sums), MASKED)
        for g in range(group):
            out[0, g] = (acc[g] / sums[g : g + 1, :]).T.astype(out.dtype)


# What forward and backward share


PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
)


def current_step(steps):
    """The pair of blocks at this point of the grid."""
    return unpack_step(steps[_at(steps, pl.program_id(0), pl.program_id(2))])


def on_needed_tile(step, variant, q_tokens, kv_tokens, tile):
    """Runs `tile(None)` on a tile that everything in it sees, `tile(mask)` on one that needs a mask."""

    @pl.when(step.whole == 1)
    def _():
        tile(None)

    @pl.when((step.compute == 1) & (step.whole == 0))
    def _():
        kv_columns = kv_tokens[0].T
        q_segment, q_position = q_tokens[0, 0:1, :], q_tokens[0, 1:2, :]
        kv_segment, kv_position = kv_columns[:, 0:1], kv_columns[:, 1:2]
        see = (kv_segment == q_segment) & (q_segment != 0)
        if variant.causal:
            see &= q_position >= kv_position
        if variant.window is not None:
            see &= q_position - kv_position < variant.window
            if not variant.causal:
                see &= kv_position - q_position < variant.window
        tile(see)


def logits_of(k, q, variant):
    """Logits [s, t] in base 2 (logits · log₂e), and their slope in the uncapped ones (1 without a cap)."""
    raw = product(k, q, "SH,TH->ST")
    if variant.softcap is None:
        return raw * (variant.scale * LOG2E), 1
    bent = jnp.tanh(raw * (variant.scale / variant.softcap))
    return bent * (variant.softcap * LOG2E), 1 - bent * bent


def product(a, b, letters):
    """A matrix product with float32 accumulation; float32 operands keep their precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(letters, a, b, precision=precision, preferred_element_type=jnp.float32)


def _at(steps, row, step):
    """Index of a step in the flattened lists: scalar memory pads the rows of a matrix."""
    return row * (steps.shape[0] // pl.num_programs(0)) + step


class Call:
    """The shapes, block specs and array layouts of one attention call."""

    def __init__(self, q, k, tokens: Tokens, plan: Plan, variant: Variant):
        if plan.block_q % LANES or plan.block_kv % LANES:
            raise NotImplementedError(
                f"attention: backend 'tpu' needs blocks in multiples of {LANES}, got {(plan.block_q, plan.block_kv)}; "
                "pass such blocks to make_plan, or none"
            )
        self.length_q, self.length_kv = q.shape[1], k.shape[1]
        self.B, self.N, self.K, self.H = q.shape[0], q.shape[2], k.shape[2], q.shape[3]
        self.group = self.N // self.K
        self.T, self.S = plan.blocks_q * plan.block_q, plan.blocks_kv * plan.block_kv
        self.plan, self.dtype = plan, q.dtype
        self.axes = varying_axes((q, k, tokens, plan))
        self.causal = variant.causal
        tokens = pad_tokens(tokens, self.T, self.S)
        sublanes = jnp.zeros((self.B, 6, self.S), jnp.int32)  # eight rows, so that the kernel can transpose them
        self.token_rows = (
            jnp.stack([tokens.q_segment_ids, tokens.q_positions], axis=1),
            jnp.concatenate([jnp.stack([tokens.kv_segment_ids, tokens.kv_positions], axis=1), sublanes], axis=1),
        )
        block_q, block_kv, group = plan.block_q, plan.block_kv, self.group
        self.queries = pl.BlockSpec((1, group, block_q, self.H), self._index(lambda b, n, at: (b, n, at.i, 0)))
        self.keys = pl.BlockSpec((1, 1, block_kv, self.H), self._index(lambda b, n, at: (b, n, at.j, 0)))
        self.query_tokens = pl.BlockSpec((1, 2, block_q), self._index(lambda b, n, at: (b, 0, at.i)))
        self.key_tokens = pl.BlockSpec((1, 8, block_kv), self._index(lambda b, n, at: (b, 0, at.j)))
        self.query_scalars = pl.BlockSpec((1, 1, group, block_q), self._index(lambda b, n, at: (b, n, 0, at.i)))

    def _index(self, choose):
        def index_map(b, n, s, steps):
            return choose(b, n, unpack_step(steps[b * (steps.shape[0] // self.B) + s]))

        return index_map

    def grid(self, steps, inputs, outputs, scratch) -> pltpu.PrefetchScalarGridSpec:
        """One step a needed block; `steps` [B] is how many each row has."""
        return pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(self.B, self.K, jnp.max(steps)),
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=scratch,
        )

    def shape(self, shape, dtype) -> jax.ShapeDtypeStruct:
        """An output's shape, varying over the mesh axes that the inputs vary over."""
        return typed_shape(shape, dtype, self.axes)

    def heads_first(self, x, length) -> Any:
        """[B, T, N, H] -> [B, N, length, H], filled up with zeros."""
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - x.shape[1]), (0, 0)))

    def blocks_first(self, of_queries, of_keys) -> list[Any]:
        """All operands [B, T, N, H] heads first and filled up to whole blocks."""
        return [self.heads_first(x, self.T) for x in of_queries] + [self.heads_first(x, self.S) for x in of_keys]

    def heads_last(self, x, length) -> Any:
        """[B, N, T, H] -> [B, length, N, H]."""
        return x[:, :, :length].swapaxes(1, 2)

    def scalars_first(self, x) -> Any:
        """[B, T, N] -> [B, K, G, whole blocks]."""
        x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, self.T - x.shape[1])))
        return x.reshape(self.B, self.K, self.group, self.T)

    def scalars_last(self, x) -> Any:
        """[B, K, G, whole blocks] -> [B, T, N]."""
        return x.reshape(self.B, self.N, self.T)[:, :, : self.length_q].swapaxes(1, 2)

    def cost(self, products: int) -> pl.CostEstimate:
        """Of a row that is one document: what the plan skips is not known before it runs."""
        pairs = self.B * self.N * self.length_q * self.length_kv // (2 if self.causal else 1)
        queries, keys = self.B * self.N * self.T * self.H, self.B * self.K * self.S * self.H
        return pl.CostEstimate(
            flops=2 * products * pairs * self.H,
            transcendentals=pairs,
            bytes_accessed=(2 * queries + 2 * keys * self.plan.blocks_q) * self.dtype.itemsize,
        )
