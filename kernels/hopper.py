"""What the kernels for Hopper GPUs (sm90) share: layouts, named barriers, and whether a device is one."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
SMS = 132
"""Multiprocessors of an H100 or H200; on a chip with fewer, some blocks of threads wait for a place."""

PARAMS = plgpu.CompilerParams(approx_math=True)
WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def too_old() -> bool:
    """Whether this jax is older than the dialect the kernels are written in."""
    return jax.__version_info__ < (0, 11, 2)


def is_hopper(device: Any) -> bool:
    """Whether these kernels run on a device."""
    return getattr(device, "compute_capability", None) == "9.0"


def stretched(x, shape, dimension):
    """A vector along `dimension` of a tile."""
    return lax.broadcast_in_dim(x, shape, [dimension])


class Handover(NamedTuple):
    """Named barriers of the block of threads, on which a warp arrives at once (an mbarrier takes every thread apart).

    The dialect uses the numbers below 4 itself.
    """

    first: int
    threads: int

    def arrive(self, index=0):
        _bar("arrive", self.first + index, self.threads)

    def wait(self, index=0):
        """Arrives, too: nobody passes before `threads` of them have."""
        _bar("sync", self.first + index, self.threads)


def _bar(operation: str, number, threads: int):
    from jax.experimental.mosaic.gpu.utils import inline_ptx  # new in jax 0.11

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def bar(_, number):
        inline_ptx(f"bar.{operation} $0, {threads};", number.registers[()])

    bar(jnp.int32(number))
