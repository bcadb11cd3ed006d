"""Runs a per-device function over the rows a device holds: how losses call the kernels on a mesh."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dqjax.sharding import Rules


def rows_spec(rules: Rules, batch: int) -> PartitionSpec:
    """How an array that leads with the batch dimension, of size `batch`, is split."""
    return PartitionSpec(rules.spec(("batch",), (batch,))[0])


def table_spec(rules: Rules, shape: Sequence[int]) -> PartitionSpec:
    """How an output table `[V, D]` is split while it is used; its first entry is the kernels' `axis_name`."""
    return rules.spec(("vocab_in_use", "table"), shape)


def per_device(f: Callable, rules: Rules, in_specs: Any, out_specs: Any) -> Callable:
    """`f` under `shard_map`; `f` itself on a mesh of one device. Take gradients outside."""
    if rules.mesh.size == 1:
        return f
    return functools.partial(
        jax.shard_map, mesh=rules.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )(f)
