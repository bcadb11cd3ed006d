"""Decode attention in plain XLA: the cache is read in its own dtype and head layout, products accumulate in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def xla_decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, "B"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Float[Array, "B N H"]:
    """As the reference, with the weights rounded to the cache's dtype; entries past `lengths` must be finite."""
    B, N, H = q.shape
    S, K = k_cache.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum(
        "BKGH,BSKH->BKGS", q.reshape(B, K, N // K, H), k_cache, preferred_element_type=wide
    )
    logits = logits * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    s = jnp.arange(S)
    see = s < lengths[:, None]
    if window is not None:
        see &= s >= lengths[:, None] - window
    see = see[:, None, None]
    peak = jnp.max(logits, axis=-1, keepdims=True, where=see, initial=jnp.finfo(wide).min)
    weights = jnp.where(see, jnp.exp(logits - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("BKGS,BSKH->BKGH", weights.astype(v_cache.dtype), v_cache, preferred_element_type=wide)
    return (out / jnp.where(total > 0, total, 1)).reshape(B, N, H).astype(q.dtype)
