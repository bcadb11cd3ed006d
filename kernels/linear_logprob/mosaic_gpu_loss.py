"""Cross-entropy with known weights on Hopper GPUs: three products, and no pass over the logits between them.

A row's softmax is wanted only up to a factor, so its exponentials are taken against an anchor that is known before the
product: the label's own logit, and a margin. With E = exp(z - anchor) in bfloat16, which has the range of float32,

    lse = anchor + log Σ E
    dz = factor · E,    factor = weight (1 + 2 z_loss lse) exp(anchor - lse) / temperature

but for the label, whose entry of E becomes exp(label - anchor) - exp(lse - anchor) / (1 + 2 z_loss lse). The factor
goes over to the small sides of the products: dx = factor · (E w), dw = Eᵀ (factor · x). On an H200, bfloat16, 16384 ×
1024 × 151936, forward and backward take 24.9 ms (`kernels/results/h200.json`).

That holds for losses up to twice the margin. Where the model gives a label less than 1e-52, everything is done once
more with the lse itself, from `mosaic_gpu.statistics`, for an anchor: right for any logits, in more than twice the time
and no more memory.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dqjax.kernels.linear_logprob import mosaic_gpu, over_rows
from dqjax.kernels.linear_logprob.head import MASKED, Head
from dqjax.kernels.linear_logprob.labels import label_logits, put, shard_limit
from dqjax.kernels.linear_logprob.mosaic_gpu_logprob import log_normaliser
from dqjax.kernels.linear_logprob.objectives import CrossEntropy
from dqjax.kernels.linear_logprob.tiles import tile_size
from dqjax.kernels.varying import vary, varying_axes

TILE = 5 * 2**26
"""Entries of E held at once: 640 MiB."""

MARGIN = 60.0
"""e to this and to its negative are far inside of bfloat16's range."""

LEAST_BEND = 2.0**-20
"""Stands for a 1 + 2 z_loss lse of 0, by which the label's entry is divided."""


def value(
    objective: CrossEntropy,
    head: Head,
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    weight: Float[Array, "M"],
    labels: Int[Array, "M"],
    _: None,
) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    """Σ weight · loss and logprob, from statistics alone."""
    at_label, _ = label_logits(head, x, w, labels)
    lse, _ = log_normaliser(head, x, w)
    return _graded(objective, head, weight, labels, at_label, lse)


def gradients(
    objective: CrossEntropy,
    head: Head,
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    weight: Float[Array, "M"],
    labels: Int[Array, "M"],
    _: None,
) -> tuple[tuple[Float[Array, ""], Float[Array, "M"]], tuple[Float[Array, "M D"], Float[Array, "V D"]]]:
    """The same, and the sum's gradients in x and w."""
    (M, D), V = x.shape, len(w)
    _, limit = shard_limit(head, V)
    at_label, place = label_logits(head, x, w, labels)
    chunks = -(-M // max(over_rows.LEAST_ROWS, tile_size("weighted_rows", "mosaic_gpu", x, V, TILE) // V))
    per_chunk = -(-M // (chunks * mosaic_gpu.TALL)) * mosaic_gpu.TALL

    def split(a):
        a = jnp.pad(a, [(0, per_chunk * chunks - M)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(chunks, per_chunk, *a.shape[1:])

    def chunk(dw, rows):
        x, weight, anchor, at_label, place = rows
        e, sums = mosaic_gpu.exponentials(x, w, limit[None], anchor, head.temperature)
        lse = anchor + jnp.log(head.sum(sums.sum(axis=0)))
        bend = 1 + 2 * objective.z_loss * lse
        bend = jnp.where(jnp.abs(bend) < LEAST_BEND, LEAST_BEND, bend)
        e = put(e, place, jnp.exp(at_label - anchor) - jnp.exp(lse - anchor) / bend)
        factor = (weight * bend * jnp.exp(anchor - lse) / head.temperature)[:, None]
        dx = factor * jnp.einsum("MV,VD->MD", e, w, preferred_element_type=jnp.float32)
        dw += jnp.einsum("MV,MD->VD", e, (factor * x).astype(x.dtype), preferred_element_type=jnp.float32)
        return dw, (dx.astype(x.dtype), lse)

    def attempt(state):
        attempts, anchor, *_ = state
        anchor = lax.cond(attempts == 0, lambda: anchor, lambda: log_normaliser(head, x, w)[0])
        parts = jax.tree.map(split, (x, weight, anchor, at_label, place))
        dw, parts = lax.scan(chunk, zero_dw, parts)
        dx, lse = (y.reshape(per_chunk * chunks, *y.shape[2:])[:M] for y in parts)
        return attempts + 1, anchor, lse, dx, dw

    def another(state):
        attempts, anchor, lse, _, _ = state
        return (attempts == 0) | ((attempts == 1) & ~jnp.all(jnp.abs(lse - anchor) <= MARGIN + 1))

    zero_dx, zero_dw = vary((jnp.zeros_like(x), jnp.zeros(w.shape, jnp.float32)), varying_axes(x))
    state = jnp.int32(0), at_label + MARGIN, at_label, zero_dx, zero_dw
    _, _, lse, dx, dw = lax.while_loop(another, attempt, state)
    return _graded(objective, head, weight, labels, at_label, lse), (dx, dw.astype(w.dtype))


def _graded(objective, head, weight, labels, at_label, lse):
    logprob = at_label - lse
    if head.vocab is not None:
        logprob = jnp.where(labels < head.vocab, logprob, MASKED)
    return jnp.sum(weight * (objective.z_loss * lse**2 - logprob)), logprob


MOSAIC_GPU = over_rows.Route(value, gradients)
