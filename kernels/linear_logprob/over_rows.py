"""Weighted sums of row objectives, with the gradient formed in the forward pass, some rows at a time.

The weights are known beforehand, so one tile of logits gives value and gradient: three products for a tied pair of
forward and backward (6 · M · D · V FLOPs) where recomputing the logits would take four. The rows of a chunk lie a
stride apart,

    x [M, D] -> [rows, chunks, D],   chunk c = x[:, c]

so that a batch split over the mesh stays where it is: every chunk takes some rows of every device.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dqjax.kernels.linear_logprob.head import Head
from dqjax.kernels.linear_logprob.tiles import tile_size
from dqjax.kernels.varying import vary, varying_axes

TILE = 2**25
"""Logits held at once: 128 MiB in float32."""

GPU_TILE = 3 * 2**26
"""On a GPU, whose cache holds no tile of use: the most that keeps 16384 × 1024 × 151936 under 2 GB of temporaries."""

LEAST_ROWS = 1024
"""Fewer rows would spend the time adding up the table's gradient instead of multiplying."""


class Route(NamedTuple):
    """A way to compute the weighted sum, on operands as those of `weighted_rows`.

    Attributes:
      value: (objective, head, x, w, weight, rows, table) -> sum, auxiliary numbers.
      gradients: likewise -> (sum, auxiliary numbers), (the sum's gradients in x and w, in their dtypes).
    """

    value: Callable[..., Any]
    gradients: Callable[..., Any]


def weighted_rows(
    objective: Any,
    head: Head,
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    weight: Float[Array, "M"],
    rows: Any,
    table: Float[Array, "U E"] | None,
    route: Route,
) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    """Σ weight · objective(rows of logits), and the objective's auxiliary number of each row (0 where weight is 0).

    Args:
      objective: as in `objectives.py`, hashable.
      head: vocabulary, temperature and mesh axis.
      x, w: hidden states and table; these get gradients.
      weight: a row of weight 0 gets no gradient and gives none, whatever it holds.
      rows, table: what else the objective needs: arrays that lead with M, and the teacher's table. No gradient.
      route: how it is computed.
    """
    keep = weight != 0
    x = jnp.where(keep[:, None], x, 0)
    weight, rows, table = lax.stop_gradient((weight, rows, table))
    rows = jax.tree.map(lambda r: jnp.where(keep.reshape(-1, *[1] * (r.ndim - 1)), r, jnp.zeros((), r.dtype)), rows)
    total, aux = _weighted(route, objective, head, *vary((x, w), varying_axes((x, w, weight))), weight, rows, table)
    return total, jnp.where(keep, lax.stop_gradient(aux), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weighted(route, objective, head, x, w, weight, rows, table):
    return route.value(objective, head, x, w, weight, rows, table)


def _forward(route, objective, head, *operands):
    return route.gradients(objective, head, *operands)


def _backward(route, objective, head, saved, cotangents):
    dx, dw = saved
    g = head.cotangent(cotangents[0], dw)
    return (g * dx).astype(dx.dtype), (g * dw).astype(dw.dtype), None, None, None


_weighted.defvjp(_forward, _backward)


def _value(objective, head, x, w, weight, rows, table):
    def chunk(carry, x, weight, rows):
        graded, _ = _grade(objective, head, x, w, weight, rows, table)
        return carry + jnp.sum(weight * graded.value), graded.aux

    return _over_chunks(chunk, _no_loss(head, x), x, w, weight, rows, table)


def _gradients(objective, head, x, w, weight, rows, table):
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def chunk(carry, x, weight, rows):
        total, dw = carry
        graded, d_logits = _grade(objective, head, x, w, weight, rows, table)
        dx = jnp.einsum("MV,VD->MD", d_logits, w, preferred_element_type=wide).astype(x.dtype)
        dw += jnp.einsum("MV,MD->VD", d_logits, x, preferred_element_type=wide)
        return (total + jnp.sum(weight * graded.value), dw), (graded.aux, dx)

    start = _no_loss(head, x), vary(jnp.zeros(w.shape, wide), varying_axes(x))
    (total, dw), (aux, dx) = _over_chunks(chunk, start, x, w, weight, rows, table)
    return (total, aux), (dx, dw.astype(w.dtype))


XLA = Route(_value, _gradients)


def _no_loss(head, x):
    """0, varying over the mesh axes of a loss: those of the rows, without the one that splits the vocabulary."""
    zero = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
    return vary(zero, varying_axes(x) - {head.axis_name})


def _grade(objective, head, x, w, weight, rows, table):
    columns = head.columns(0, w.shape[0], w.shape[0])
    graded = objective(head, head.logits(x, w, columns), columns, rows, table)
    d_logits = graded.d_logits * (weight / head.temperature)[:, None]
    return graded, d_logits.astype(w.dtype)


def _over_chunks(chunk, carry, x, w, weight, rows, table):
    """Runs `chunk` over the rows; returns the last carry and the stacked outputs as arrays that lead with M."""
    M, width = x.shape[0], len(w) + (0 if table is None else len(table))
    tile = tile_size("weighted_rows", "xla", x, width, GPU_TILE if jax.default_backend() == "gpu" else TILE)
    chunks = -(-M // max(LEAST_ROWS, tile // width))
    if chunks == 1:
        return chunk(carry, x, weight, rows)
    per_chunk = -(-M // chunks)

    def split(r):
        r = jnp.pad(r, [(0, per_chunk * chunks - M)] + [(0, 0)] * (r.ndim - 1))
        return r.reshape(per_chunk, chunks, *r.shape[1:])

    def join(y):
        return jnp.moveaxis(y, 0, 1).reshape(per_chunk * chunks, *y.shape[2:])[:M]

    split_rows = jax.tree.map(split, (x, weight, rows))

    def step(carry, c):
        return chunk(carry, *jax.tree.map(lambda r: lax.dynamic_index_in_dim(r, c, axis=1, keepdims=False), split_rows))

    carry, outputs = lax.scan(step, carry, jnp.arange(chunks))
    return carry, jax.tree.map(join, outputs)
