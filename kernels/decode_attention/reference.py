"""Decode attention as its formula reads, in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.mask import Variant



def reference_decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, "B"],
    variant: Variant,
) -> Float[Array, "B N H"]:
    """softmax(scale · q kᵀ) v over the first `lengths` keys (the last `window` of them); 0 where there is none."""
    B, N, H = q.shape
    S, K = k_cache.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    s = jnp.arange(S)
    see = s < lengths[:, None]
    if variant.window is not None:
        see &= s >= lengths[:, None] - variant.window
    k, v = (jnp.where(see[..., None, None], x, 0).astype(wide) for x in (k_cache, v_cache))
    logits = variant.scale * jnp.einsum("BKGH,BSKH->BKGS", q.reshape(B, K, N // K, H).astype(wide), k)
    if variant.softcap is not None:
        logits = variant.softcap * jnp.tanh(logits / variant.softcap)
    see = see[:, None, None]
    peak = jnp.max(logits, axis=-1, keepdims=True, where=see, initial=jnp.finfo(wide).min)
    weights = jnp.where(see, jnp.exp(logits - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    return jnp.einsum("BKGS,BSKH->BKGH", weights, v).reshape(B, N, H).astype(q.dtype)
