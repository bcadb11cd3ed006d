"""Attention as its formula reads, with all B·N·T·S logits in memory: the yardstick of every other backend."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dqjax.kernels.attention.mask import MASKED, Tokens, Variant, visible


def reference_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    variant: Variant,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """softmax(scale · q kᵀ) v over the visible keys, and the log of the softmax's denominator.

    The softmax is in float32 (float64 for float64 inputs); gradients are JAX's own.

    Returns:
      The output in q's dtype, and lse in the softmax's. A query that sees nothing has output 0 and lse `MASKED`.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    qg = q.reshape(B, T, K, N // K, H).astype(wide)
    logits = variant.scale * jnp.einsum("BTKGH,BSKH->BKGTS", qg, k.astype(wide))
    if variant.softcap is not None:
        logits = variant.softcap * jnp.tanh(logits / variant.softcap)
    see = visible(tokens, variant.causal, variant.window)[:, None, None]
    logits = jnp.where(see, logits, MASKED)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(see, jnp.exp(logits - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)  # before the division and the log, or their gradients are NaN
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights / total, v.astype(wide))
    lse = jnp.where(some, peak + jnp.log(total), MASKED)
    lse = jnp.moveaxis(lse[..., 0], 3, 1)
    return out.reshape(B, T, N, H).astype(q.dtype), lse.reshape(B, T, N)
