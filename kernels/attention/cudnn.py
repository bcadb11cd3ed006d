"""cuDNN's fused attention through `jax.nn`, for the masks that it takes by name.

It knows no segment ids here (packed offsets are not public in jax, and a bool mask costs T × S memory), so it serves
rows that are one whole document each.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dqjax.kernels.attention.mask import Variant


def cudnn_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], variant: Variant
) -> Float[Array, "B T N H"]:
    """Causal or full attention without padding, with cuDNN's own gradients."""
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=variant.causal, scale=variant.scale, implementation="cudnn"
    )


def why_not_cudnn(
    q: jax.Array, k: jax.Array, variant: Variant, *, segments: bool, positions: bool, return_lse: bool
) -> str | None:
    """The first thing of a call that cuDNN cannot do, or None."""
    reasons = {
        "segment ids": segments,
        "positions": positions,
        "a window": variant.window is not None,
        "a softcap": variant.softcap is not None,
        "lse": return_lse,
        "float32": q.dtype not in (jnp.bfloat16, jnp.float16),
        "a head size above 128 or not a multiple of 8": q.shape[3] > 128 or q.shape[3] % 8 != 0,
        "a causal mask between rows of different lengths": variant.causal and q.shape[1] != k.shape[1],
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
