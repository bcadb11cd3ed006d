"""One table from logical axes to mesh axes, and the meshes it speaks of.

Arrays name their axes by meaning ("batch", "embed", "heads"); `Rules` says which mesh axis each name is split over. The
value is passed as an argument and is hashable, so two rule sets can live in one process.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import Field

from dqjax.config import Section

log = logging.getLogger(__name__)

MESH_AXES = ("slice", "data", "fsdp", "tensor")

DEFAULT_TABLE: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("slice", "data", "fsdp"),
    "length": (),
    # parameters; `embed` is the model dimension of a weight, `table` that of the embedding and output tables, which
    # stays whole: split over fsdp, XLA rematerialises the table fully at the gather. The tables are stored split over
    # fsdp by their rows instead (`vocab`) and gathered for use (`vocab_in_use`).
    "embed": ("fsdp",),
    "table": (),
    "vocab": ("tensor", "fsdp"),
    "vocab_in_use": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "layers": (),
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """A mesh and the table from logical axis to mesh axes.

    Attributes:
      mesh: the devices, with axes out of `MESH_AXES`.
      table: pairs (logical axis, mesh axes); later pairs win.
    """

    mesh: Mesh
    table: tuple[tuple[str, tuple[str, ...]], ...] = tuple(DEFAULT_TABLE.items())

    def spec(self, names: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
        """The `PartitionSpec` of an array whose axes are called `names` (None: not split).

        With `shape`, a mesh axis whose size does not divide what is left of the dimension is dropped: 2 key-value heads
        on a tensor axis of 4 are replicated, as they must be.

        Raises:
          ValueError: an unknown name, or two dimensions on one mesh axis.
        """
        table = dict(self.table)
        used: dict[str, str] = {}
        parts: list[Any] = []
        for i, name in enumerate(names):
            if name is None:
                parts.append(None)
                continue
            if name not in table:
                raise ValueError(f"unknown logical axis {name!r}; the rules know {sorted(table)}")
            axes, left = [], None if shape is None else shape[i]
            for axis in table[name]:
                size = self.mesh.shape.get(axis, 1)
                if size == 1:
                    continue
                if left is not None:
                    if left % size:
                        continue
                    left //= size
                if axis in used:
                    raise ValueError(
                        f"axes {used[axis]!r} and {name!r} of {tuple(names)} both lie on mesh axis {axis!r}; "
                        "an array can be split over a mesh axis once: change one of the two rules"
                    )
                used[axis] = name
                axes.append(axis)
            parts.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
        return PartitionSpec(*parts)

    def sharding(self, names: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
        """`spec` as a `NamedSharding` on the mesh."""
        return NamedSharding(self.mesh, self.spec(names, shape))

    @property
    def batch_shards(self) -> int:
        """Number of parts the batch dimension is split into."""
        return math.prod(self.mesh.shape.get(axis, 1) for axis in dict(self.table)["batch"])

    def constrain(self, x: jax.Array, *names: str | None) -> jax.Array:
        """`with_sharding_constraint` by logical names; the identity on a mesh of one device."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(names, x.shape))


def make_mesh(
    *, slice: int = 1, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over `MESH_AXES` with Auto axis types (the Explicit default of jax refuses the embedding gather).

    One size may be -1: it takes the devices that the others leave.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [slice, data, fsdp, tensor]
    if sizes.count(-1) > 1:
        raise ValueError(f"mesh: at most one axis may be -1, got {dict(zip(MESH_AXES, sizes))}")
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1)
        if len(devices) % rest:
            raise ValueError(
                f"mesh: {len(devices)} devices cannot be split by {dict(zip(MESH_AXES, sizes))}; "
                f"the fixed sizes multiply to {rest}, which must divide {len(devices)}"
            )
        sizes[sizes.index(-1)] = len(devices) // rest
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh: {dict(zip(MESH_AXES, sizes))} needs {math.prod(sizes)} devices, there are {len(devices)}; "
            "set one axis to -1 to take what is there"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices == list(jax.devices()) and slice == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=types)


def shardings_of(rules: Rules, names: Any, shapes: Any) -> Any:
    """NamedShardings for a tree of shapes, given the same tree of logical axis names (tuples)."""
    return jax.tree.map(lambda s, n: rules.sharding(n, s.shape), shapes, names, is_leaf=lambda x: hasattr(x, "shape"))


def local_part(x: jax.Array) -> np.ndarray:
    """The rows that this process's devices hold of an array which is split over its leading dimension alone."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


class MeshConfig(Section):
    """mesh: sizes of the axes; one may be -1 and takes the devices that the others leave.

    slice: TPU slices, joined by the data-centre network. data: copies of everything. fsdp: parameters and optimizer
    state split, gathered layer by layer. tensor: heads, feed-forward and vocabulary split. The batch is split over
    slice × data × fsdp.
    """

    slice: int = Field(1, ge=-1)
    data: int = Field(1, ge=-1)
    fsdp: int = Field(-1, ge=-1)
    tensor: int = Field(1, ge=-1)
