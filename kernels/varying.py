"""Mesh axes that a value varies over inside `shard_map`: loops and custom derivatives must agree on them.

Outside `shard_map`, and inside one with `check_vma=False`, nothing varies and everything here is the identity.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes that any array of `tree` varies over."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Marks every array as varying over `axes` too; the transpose of that is the sum over the axes it adds."""

    def widen(x):
        missing = tuple(sorted(axes - varying_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(widen, tree)


def typed_shape(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """The shape of a Pallas kernel's output, varying over `axes` as `shard_map` asks."""
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    sample = jax.eval_shape(lambda: lax.pcast(jnp.zeros(()), tuple(sorted(axes)), to="varying"))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=sample.manual_axis_type)
