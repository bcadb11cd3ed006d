"""Mesh axes that a value varies over inside `shard_map`: loops and custom derivatives must agree on them.

Outside `shard_map`, and inside one with `check_vma=False`, nothing varies and everything here is the identity.
"""

from typing import Any

import jax
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
