"""Blockwise attention in plain XLA: a tile of logits at a time, on any device, with O(T · block) memory.

Loops run over query blocks and, inside, over the key blocks that the plan gives; rows of a batch share a loop, so its
range is the union of theirs. The backward pass adds to dK and dV in float32 as it goes.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dqjax.kernels.attention.mask import MASKED, Tokens, Variant, pad_tokens, visible
from dqjax.kernels.attention.plan import Plan
from dqjax.kernels.attention.vjp import Kernel, delta_of
from dqjax.kernels.varying import vary, varying_axes


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    plan: Plan,
    variant: Variant,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Output and lse by a softmax that is rescaled block after block (Milakov & Gimelshein, 2018)."""
    B, T, N, H = q.shape
    K, G = k.shape[2], N // k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    (q,), (k, v), tokens = _to_blocks(plan, (q.reshape(B, T, K, G, H),), (k, v), tokens)

    def query_block(i, results):
        qi, rows = _block(q, i, plan.block_q), _query_tokens(tokens, i, plan.block_q)

        def key_block(j, carry):
            peak, total, acc = carry
            kj, vj = _block(k, j, plan.block_kv), _block(v, j, plan.block_kv)
            see = _visible(rows, tokens, j, plan, variant)
            logits = jnp.where(see, _logits(qi, kj, variant, wide)[0], MASKED)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
            weights = jnp.where(see, jnp.exp(logits - new_peak[..., None]), 0)
            shrink = jnp.exp(peak - new_peak)
            total = total * shrink + jnp.sum(weights, axis=-1)
            update = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(vj.dtype), vj, preferred_element_type=wide)
            return new_peak, total, acc * shrink[..., None] + update

        rows_shape = (B, K, G, plan.block_q)
        start = (jnp.full(rows_shape, MASKED, wide), jnp.zeros(rows_shape, wide), jnp.zeros((*rows_shape, H), wide))
        peak, total, acc = _over_keys(plan, i, key_block, _vary_like(start, (q, k, v, tokens)))
        some = total > 0
        total = jnp.where(some, total, 1)
        out_i = (acc / total[..., None]).transpose(0, 3, 1, 2, 4).astype(q.dtype)
        lse_i = jnp.where(some, peak + jnp.log(total), MASKED).transpose(0, 3, 1, 2)
        return _put(results[0], out_i, i, plan.block_q), _put(results[1], lse_i, i, plan.block_q)

    results = jnp.zeros(q.shape, q.dtype), jnp.zeros(q.shape[:-1], wide)
    out, lse = _loop(0, q.shape[1] // plan.block_q, query_block, _vary_like(results, (q, k, v, tokens)))
    return out.reshape(B, -1, N, H)[:, :T], lse.reshape(B, -1, N)[:, :T]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    plan: Plan,
    variant: Variant,
    lse: Float[Array, "B T N"],
    out: Float[Array, "B T N H"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """dq, dk, dv by the formulas of `vjp.py`, a tile at a time; dk and dv in float32."""
    B, T, N, H = q.shape
    S, K, G = k.shape[1], k.shape[2], N // k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    delta = delta_of(out, d_out, d_lse)
    grouped = [x.reshape(B, T, K, G, *x.shape[3:]) for x in (q, d_out, lse, delta)]
    (q, d_out, lse, delta), (k, v), tokens = _to_blocks(plan, grouped, (k, v), tokens)

    def query_block(i, carry):
        dq, dk, dv = carry
        rows = _query_tokens(tokens, i, plan.block_q)
        qi, doi, lse_i, delta_i = (_block(x, i, plan.block_q) for x in (q, d_out, lse, delta))
        lse_i, delta_i = (x.transpose(0, 2, 3, 1)[..., None] for x in (lse_i, delta_i))

        def key_block(j, carry):
            dqi, dk, dv = carry
            kj, vj = _block(k, j, plan.block_kv), _block(v, j, plan.block_kv)
            logits, slope = _logits(qi, kj, variant, wide)
            see = _visible(rows, tokens, j, plan, variant)
            weights = jnp.where(see, jnp.exp(logits - lse_i), 0)
            dvj = jnp.einsum("BKGTS,BTKGH->BSKH", weights.astype(doi.dtype), doi, preferred_element_type=wide)
            d_weights = jnp.einsum("BTKGH,BSKH->BKGTS", doi, vj, preferred_element_type=wide)
            d_logits = weights * (d_weights - delta_i) * slope
            d_logits = d_logits.astype(q.dtype)
            dqi += jnp.einsum("BKGTS,BSKH->BTKGH", d_logits, kj, preferred_element_type=wide)
            dkj = jnp.einsum("BKGTS,BTKGH->BSKH", d_logits, qi, preferred_element_type=wide)
            return dqi, _add(dk, dkj, j, plan.block_kv), _add(dv, dvj, j, plan.block_kv)

        zero = _vary_like(jnp.zeros(qi.shape, wide), (q, k, v, d_out, tokens))
        dqi, dk, dv = _over_keys(plan, i, key_block, (zero, dk, dv))
        return _put(dq, (dqi * variant.scale).astype(q.dtype), i, plan.block_q), dk, dv

    start = jnp.zeros(q.shape, q.dtype), jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    start = _vary_like(start, (q, k, v, d_out, tokens))
    dq, dk, dv = _loop(0, q.shape[1] // plan.block_q, query_block, start)
    return dq.reshape(B, -1, N, H)[:, :T], (dk * variant.scale)[:, :S], dv[:, :S]


XLA = Kernel(forward, backward)


def _logits(qi, kj, variant: Variant, wide):
    """Scaled and capped logits [B, K, G, T, S], and their slope in `scale · q·k` (1 without a cap)."""
    logits = variant.scale * jnp.einsum("BTKGH,BSKH->BKGTS", qi, kj, preferred_element_type=wide)
    if variant.softcap is None:
        return logits, 1
    bent = jnp.tanh(logits / variant.softcap)
    return variant.softcap * bent, 1 - bent * bent


def _to_blocks(plan: Plan, of_queries, of_keys, tokens: Tokens):
    """Pads the rows to whole blocks with tokens of segment 0."""
    t, s = plan.kv_start.shape[1] * plan.block_q, -(-plan.length_kv // plan.block_kv) * plan.block_kv

    def pad(x, length):
        return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    return [pad(x, t) for x in of_queries], [pad(x, s) for x in of_keys], pad_tokens(tokens, t, s)


def _block(x, i, size):
    return x if x.shape[1] == size else lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _put(x, block, i, size):
    return block if x.shape[1] == size else lax.dynamic_update_slice_in_dim(x, block, i * size, axis=1)


def _add(x, block, i, size):
    return _put(x, _block(x, i, size) + block, i, size)


def _query_tokens(tokens: Tokens, i, size):
    return _block(tokens.q_segment_ids, i, size), _block(tokens.q_positions, i, size)


def _visible(rows, tokens: Tokens, j, plan: Plan, variant: Variant):
    kv = _block(tokens.kv_segment_ids, j, plan.block_kv), _block(tokens.kv_positions, j, plan.block_kv)
    return visible(Tokens(rows[0], kv[0], rows[1], kv[1]), variant.causal, variant.window)[:, None, None]


def _over_keys(plan: Plan, i, body, carry):
    """Runs `body` over the key blocks that any row of the batch needs for query block i."""
    if plan.length_kv <= plan.block_kv:
        return body(0, carry)
    needed = plan.kv_start[:, i] < plan.kv_end[:, i]
    start = jnp.min(jnp.where(needed, plan.kv_start[:, i], -(-plan.length_kv // plan.block_kv)))
    return lax.fori_loop(start, jnp.max(plan.kv_end[:, i]), body, carry)


def _loop(start: int, end: int, body, carry):
    return body(0, carry) if end - start == 1 else lax.fori_loop(start, end, body, carry)


def _vary_like(tree, like):
    """Loops under `shard_map` ask that fresh arrays vary over the mesh axes that the results will."""
    return vary(tree, varying_axes(like))
