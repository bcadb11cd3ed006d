"""Weighted sums of row objectives, with the gradient formed in the forward pass, some rows at a time.

The weights are known beforehand, so one tile of logits gives value and gradient: three products for a tied pair of
forward and backward (6 · M · D · V FLOPs) where recomputing the logits would take four. Tiles are small, since what
grades them is float32; the products of the gradients wait for some tiles, since each reads and writes all of the
table's gradient. The rows of a chunk lie a stride apart,

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

TILE = 2**24
"""Logits held at once: 64 MiB in float32."""

GPU_TILE = 5 * 2**25
"""On a GPU, whose cache holds no tile of use."""

PARTS = 4
"""So many tiles of gradients, in the table's dtype, are put together before they are multiplied."""

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


def _value(grade, backend, objective, head, x, w, weight, rows, table):
    def some(total, x, weight, rows):
        graded, _ = grade(objective, head, x, w, weight, rows, table)
        return total + jnp.sum(weight * graded.value), graded.aux

    whole, parts = _chunks(backend, x, w, table)
    total, aux = _over_chunks(some, _no_loss(head, x), whole * parts, x, weight, rows)
    return total, _joined(aux, len(x))


def _gradients(grade, backend, objective, head, x, w, weight, rows, table):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    whole, parts = _chunks(backend, x, w, table)

    def some(total, x, weight, rows):
        graded, d_logits = grade(objective, head, x, w, weight, rows, table)
        return total + jnp.sum(weight * graded.value), (graded.aux, d_logits)

    def more(carry, x, weight, rows):
        total, dw = carry
        total, (aux, d_logits) = _over_chunks(some, total, parts, x, weight, rows)
        in_order, C = jnp.moveaxis(_split(x, parts), 1, 0), "C"
        if parts == 1:  # not to multiply in another order for an axis that is none
            in_order, d_logits, C = in_order[0], d_logits[0], ""
        dx = jnp.einsum(f"{C}MV,VD->{C}MD", d_logits, w, preferred_element_type=wide).astype(x.dtype)
        dw += jnp.einsum(f"{C}MV,{C}MD->VD", d_logits, in_order, preferred_element_type=wide)
        return (total, dw), _joined((aux, dx.reshape(parts, -1, dx.shape[-1])), len(x))

    start = _no_loss(head, x), vary(jnp.zeros(w.shape, wide), varying_axes(x))
    (total, dw), results = _over_chunks(more, start, whole, x, weight, rows)
    aux, dx = _joined(results, len(x))
    return (total, aux), (dx, dw.astype(w.dtype))


def route(grade: Callable[..., Any], backend: str) -> Route:
    """The route that grades some rows at a time.

    Args:
      grade: (objective, head, x, w, weight, rows, table) -> `Graded`, and the weighted gradient in the products x wᵀ, in
        the table's dtype.
      backend: whose choice of tiles it follows.
    """
    return Route(functools.partial(_value, grade, backend), functools.partial(_gradients, grade, backend))


def grade(objective, head, x, w, weight, rows, table):
    """Plain XLA, for any objective."""
    columns = head.columns(0, w.shape[0], w.shape[0])
    graded = objective(head, head.logits(x, w, columns), columns, rows, table)
    return graded, weighted(graded.d_logits, head, weight, w)


def weighted(d_logits: Float[Array, "M V"], head: Head, weight: Float[Array, "M"], w: Float[Array, "V D"]) -> jax.Array:
    """Of the gradient in the logits, that of the weighted sum in the products, in the table's dtype."""
    return (d_logits * (weight / head.temperature)[:, None]).astype(w.dtype)


XLA = route(grade, "xla")


def _no_loss(head, x):
    """0, varying over the mesh axes of a loss: those of the rows, without the one that splits the vocabulary."""
    zero = jnp.zeros((), jnp.promote_types(x.dtype, jnp.float32))
    return vary(zero, varying_axes(x) - {head.axis_name})


def _chunks(backend, x, w, table):
    """How many chunks of rows are multiplied, and how many parts of such a chunk are graded."""
    M, width = x.shape[0], len(w) + (0 if table is None else len(table))
    tile = tile_size("weighted_rows", backend, x, width, GPU_TILE if jax.default_backend() == "gpu" else TILE)
    together = max(LEAST_ROWS, PARTS * tile // width)
    whole = -(-M // together)
    return whole, min(PARTS, -(-PARTS * M // (whole * together)))


def _over_chunks(chunk, carry, chunks, *operands):
    """Runs `chunk(carry, *rows)` over the rows; returns the last carry and the outputs [chunks, rows of a chunk, …]."""
    if chunks == 1:
        carry, outputs = chunk(carry, *operands)
        return carry, jax.tree.map(lambda y: y[None], outputs)
    split = jax.tree.map(lambda r: _split(r, chunks), operands)

    def step(carry, c):
        return chunk(carry, *jax.tree.map(lambda r: lax.dynamic_index_in_dim(r, c, axis=1, keepdims=False), split))

    return lax.scan(step, carry, jnp.arange(chunks))


def _split(r, chunks):
    """[M, …] as [⌈M / chunks⌉, chunks, …], zeros behind the last row."""
    per_chunk = -(-len(r) // chunks)
    r = jnp.pad(r, [(0, per_chunk * chunks - len(r))] + [(0, 0)] * (r.ndim - 1))
    return r.reshape(per_chunk, chunks, *r.shape[1:])


def _joined(outputs, M):
    """Outputs of `_over_chunks` as arrays that lead with M."""
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:])[:M], outputs)
