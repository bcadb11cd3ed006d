"""Log-probability, lse and entropy of a head on Hopper GPUs, and their gradients: four products, no logits in memory.

The formulas are those of `over_vocabulary.py`. The forward pass takes the peak and both sums of every 256 columns from
the product's registers; the backward pass, over chunks of the table's rows, writes dz in bfloat16 from them and leaves
the two products with it to cuBLAS. On an H200, bfloat16, 16384 × 1024 × 151936, forward and backward take 35.4 ms and
45.2 by `over_vocabulary.py` (`kernels/results/h200.json`); at a width of 4096 both take as long.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dqjax.kernels.linear_logprob import mosaic_gpu, over_vocabulary
from dqjax.kernels.linear_logprob.head import MASKED, Head
from dqjax.kernels.linear_logprob.labels import label_logits, put, shard_limit
from dqjax.kernels.linear_logprob.tiles import tile_size
from dqjax.kernels.varying import vary, varying_axes

TILE = 2**28
"""Entries of dz held at once: 512 MiB."""


def log_normaliser(
    head: Head, x: Float[Array, "M D"], w: Float[Array, "V D"]
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """lse and entropy of every row."""
    _, limit = shard_limit(head, len(w))
    peaks, s, t = mosaic_gpu.statistics(x, w, limit[None], head.temperature)
    peak = head.max(jnp.max(peaks, axis=0))
    s, t = (head.sum(jnp.sum(y, axis=0)) for y in over_vocabulary.rescaled(s, t, peaks - peak))
    return peak + jnp.log(s), jnp.log(s) - t / s


def _forward(head, x, w, labels):
    at_label, _ = label_logits(head, x, w, labels)
    lse, entropy = log_normaliser(head, x, w)
    logprob = at_label - lse
    saved = x, w, labels, logprob, lse, entropy
    if head.vocab is not None:
        logprob = jnp.where(labels < head.vocab, logprob, MASKED)
    return (logprob, lse, entropy), saved


def _backward(head, saved, cotangents):
    x, w, labels, logprob, lse, entropy = saved
    M, V = x.shape[0], len(w)
    first, limit = shard_limit(head, V)
    a, b, c = (head.cotangent(g, w) / head.temperature for g in cotangents)
    alpha = b - a - c * entropy
    at_label = jnp.exp(logprob) * (alpha - c * logprob) + a

    def chunk(start, size, carry):
        dx, dw = carry
        rows = lax.dynamic_slice_in_dim(w, start, size, axis=0)
        here = jnp.clip(limit - start, 0, size)
        dz = mosaic_gpu.gradient(x, rows, here[None], lse, alpha, c, head.temperature)
        place = labels - first - start
        dz = put(dz, jnp.where((place >= 0) & (place < here), place, size), at_label)
        dx += jnp.einsum("MV,VD->MD", dz, rows, preferred_element_type=jnp.float32)
        dw_rows = jnp.einsum("MV,MD->VD", dz, x, preferred_element_type=jnp.float32).astype(w.dtype)
        return dx, lax.dynamic_update_slice_in_dim(dw, dw_rows, start, axis=0)

    tile = tile_size("vocabulary_logprob", "mosaic_gpu", x, V, TILE)
    size = min(V, max(over_vocabulary.LEAST_COLUMNS, tile // M // mosaic_gpu.COLUMNS * mosaic_gpu.COLUMNS))
    carry = vary((jnp.zeros(x.shape, jnp.float32), jnp.zeros(w.shape, w.dtype)), varying_axes(x))
    carry = lax.fori_loop(0, V // size, lambda i, carry: chunk(i * size, size, carry), carry)
    dx, dw = chunk(V - V % size, V % size, carry) if V % size else carry
    return dx.astype(x.dtype), dw, None


MOSAIC_GPU = over_vocabulary.Route(_forward, _backward)
