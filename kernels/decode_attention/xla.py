"""Decode attention in plain XLA, arranged so that the cache is read once, in place.

A product batched over sequences *and* heads would make XLA transpose the cache [B, S, K, H] first, which costs more
than the attention. So all heads share one product with the cache seen as [B, S, K·H], of queries that are zero outside their
own head::

    q of head 0    q q q . . . . . .
    q of head 1    . . . q q q . . .
    q of head 2    . . . . . . q q q

That is K times the arithmetic, and decoding waits for memory, not for arithmetic.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.mask import Variant



def xla_decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, "B"],
    variant: Variant,
) -> Float[Array, "B N H"]:
    """As the reference, with the weights rounded to the cache's dtype; slots past `lengths` must be finite."""
    B, N, H = q.shape
    S, K = k_cache.shape[1:3]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    own = jnp.eye(K, dtype=q.dtype)
    q_wide = jnp.einsum("BKGH,KJ->BKGJH", q.reshape(B, K, N // K, H), own).reshape(B, N, K * H)
    logits = jnp.einsum("BNC,BSC->BNS", q_wide, k_cache.reshape(B, S, K * H), preferred_element_type=wide)
    logits = logits * variant.scale
    if variant.softcap is not None:
        logits = variant.softcap * jnp.tanh(logits / variant.softcap)
    s = jnp.arange(S)
    see = s < lengths[:, None]
    if variant.window is not None:
        see &= s >= lengths[:, None] - variant.window
    see = see[:, None]
    peak = jnp.max(logits, axis=-1, keepdims=True, where=see, initial=jnp.finfo(wide).min)
    weights = jnp.where(see, jnp.exp(logits - peak), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    values = v_cache.reshape(B, S, K * H)
    out = jnp.einsum("BNS,BSC->BNC", weights.astype(values.dtype), values, preferred_element_type=wide)
    out = out / jnp.where(total > 0, total, 1)
    out = jnp.einsum("BKGJH,KJ->BKGH", out.reshape(B, K, N // K, K, H), own.astype(wide))
    return out.reshape(B, N, H).astype(q.dtype)
