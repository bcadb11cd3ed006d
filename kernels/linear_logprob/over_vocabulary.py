"""Log-probability, lse and entropy of a head, some columns of the vocabulary at a time.

Forward, over chunks of the table's rows, with the running peak m of each row (Milakov & Gimelshein, 2018):

    s = Σ exp(z - m),   t = Σ exp(z - m) (z - m)
    lse = m + log s,    entropy = log s - t / s

Backward, with cotangents a of logprob, b of lse and c of entropy, again chunk by chunk on recomputed logits:

    dz = a (1[label] - p) + b p - c p (log p + entropy)

The gradient of each table row is final after its chunk, so nothing the size of the table is added up; only dx is. The
chunks run along the vocabulary and leave M alone: a batch split over the mesh stays split.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dqjax.kernels.linear_logprob.head import MASKED, Head
from dqjax.kernels.linear_logprob.tiles import tile_size
from dqjax.kernels.varying import vary, varying_axes

TILE = 2**25
"""Logits held at once: 128 MiB in float32."""

GPU_TILE = 2**28
"""On a GPU: an H200 takes 42 ms for 16384 × 1024 × 151936 with it and 45 with `TILE`."""

LEAST_COLUMNS = 1024
KEEP = 2**22
"""Up to this many logits are saved for the backward pass: cheaper than computing them again."""


class Route(NamedTuple):
    """A way to compute the three results.

    Attributes:
      forward: (head, x, w, labels) -> (logprob, lse, entropy), what the backward pass needs.
      backward: (head, what it needs, the three cotangents) -> the gradients in x and w, and None for the labels.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def vocabulary_logprob(
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    labels: Int[Array, "M"],
    head: Head,
    route: Route,
) -> tuple[Float[Array, "M"], Float[Array, "M"], Float[Array, "M"]]:
    """As `linear_logprob`, in O(M · (D + chunk)) memory beside x, w and their gradients."""
    keep = labels >= 0
    x = jnp.where(keep[:, None], x, 0)
    results = _logprob(route, head, *vary((x, w), varying_axes((x, w, labels))), labels)
    return tuple(jnp.where(keep, y, 0) for y in results)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprob(route, head, x, w, labels):
    return route.forward(head, x, w, labels)[0]


_logprob.defvjp(
    lambda route, head, *operands: route.forward(head, *operands),
    lambda route, head, saved, cotangents: route.backward(head, saved, cotangents),
)


def _forward(head, x, w, labels):
    M, V = x.shape[0], w.shape[0]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kept_logits = head.logits(x, w, head.columns(0, V, V)) if M * V <= KEEP else None

    def chunk(carry, start, size):
        peak, s, t, at_label = carry
        columns = head.columns(start, size, V)
        logits = head.logits(x, _table_rows(w, start, size), columns) if kept_logits is None else kept_logits
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        below = logits - new_peak[:, None]
        weights = jnp.exp(below)
        s, t = rescaled(s, t, peak - new_peak)
        hit = columns == labels[:, None]
        at_label += jnp.sum(jnp.where(hit, logits, 0), axis=-1)
        return new_peak, s + jnp.sum(weights, axis=-1), t + jnp.sum(weights * below, axis=-1), at_label

    zero = jnp.zeros(M, wide)
    start = vary((jnp.full(M, MASKED, wide), zero, zero, zero), varying_axes(x))
    peak, s, t, at_label = _over_columns(x, V, chunk, start)
    common = head.max(peak)
    s, t = (head.sum(y) for y in rescaled(s, t, peak - common))
    lse, entropy = common + jnp.log(s), jnp.log(s) - t / s
    logprob = head.sum(at_label) - lse
    if head.vocab is not None:
        logprob = jnp.where(labels < head.vocab, logprob, MASKED)
    return (logprob, lse, entropy), (x, w, labels, lse, entropy, kept_logits)


def _backward(head, saved, cotangents):
    x, w, labels, lse, entropy, kept_logits = saved
    M, V = x.shape[0], w.shape[0]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    a, b, c = (head.cotangent(g, w)[:, None] / head.temperature for g in cotangents)

    def chunk(carry, start, size):
        dx, dw = carry
        columns, w_rows = head.columns(start, size, V), _table_rows(w, start, size)
        logits = head.logits(x, w_rows, columns) if kept_logits is None else kept_logits
        logp = logits - lse[:, None]
        dz = jnp.exp(logp) * (b - a - c * (logp + entropy[:, None])) + jnp.where(columns == labels[:, None], a, 0)
        dz = dz.astype(w.dtype)
        dx += jnp.einsum("MV,VD->MD", dz, w_rows, preferred_element_type=wide)
        dw_rows = jnp.einsum("MV,MD->VD", dz, x, preferred_element_type=wide).astype(w.dtype)
        return dx, dw_rows if size == V else lax.dynamic_update_slice_in_dim(dw, dw_rows, start, axis=0)

    zeros = jnp.zeros(x.shape, wide), jnp.zeros(w.shape, w.dtype)
    dx, dw = _over_columns(x, V, chunk, vary(zeros, varying_axes(x)))
    return dx.astype(x.dtype), dw, None


XLA = Route(_forward, _backward)


def rescaled(s, t, shift):
    """s and t after their peak moved up by -shift."""
    factor = jnp.exp(shift)
    # Before the first chunk s is 0 and the shift is -1e30: the product must be 0, as it is.
    return s * factor, (t + s * shift) * factor


def _table_rows(w, start, size):
    return w if size == w.shape[0] else lax.dynamic_slice_in_dim(w, start, size, axis=0)


def _over_columns(x, V, chunk, carry):
    """Runs `chunk(carry, start, size)` over the V columns: equal chunks in a loop, what is left over by itself."""
    M = x.shape[0]
    tile = tile_size("vocabulary_logprob", "xla", x, V, GPU_TILE if jax.default_backend() == "gpu" else TILE)
    size = max(LEAST_COLUMNS, tile // M // 128 * 128)
    if size >= V:
        return chunk(carry, 0, V)
    carry = lax.fori_loop(0, V // size, lambda c, carry: chunk(carry, c * size, size), carry)
    return chunk(carry, V - V % size, V % size) if V % size else carry
