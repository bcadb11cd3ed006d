"""The output head's product on Hopper GPUs (sm90), with what follows it done in registers (Pallas, Mosaic GPU dialect).

A block of threads owns a tile of 128 rows and 256 columns of z = x wᵀ / temperature. Two warpgroups multiply 64 rows
each and a third fetches ahead. Before a tile leaves the registers an epilogue turns it into what is needed of it: sums
over its columns, or a bfloat16 number for each of its entries. On an H200 the product with its epilogue takes 3 to 20%
longer than cuBLAS takes for bfloat16 logits alone (D = 4096 and 1024).

Tried and left out, as within the spread of the kernel's own time: pairs of blocks that fetch their common columns once,
and a warpgroup that starts a few steps later, so that one multiplies during the other's epilogue.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dqjax.kernels.hopper import BY_ROW, LOG2E, PARAMS, SMS, TRANSFORMS, WGMMA, Handover, stretched, too_old
from dqjax.kernels.linear_logprob.head import MASKED
from dqjax.kernels.varying import typed_shape, varying_axes

ROWS, COLUMNS = 64, 256
"""A warpgroup's part of a tile."""

TALL = 2 * ROWS
"""Rows of a tile."""

STEP, STAGES = 64, 4
"""Entries of D that are multiplied at once, and how many such parts of a tile are on their way or in use."""

PIECE = 128
"""Bytes of a tile's row that leave at once."""

ABREAST = 16
"""Tiles, one above the other, that are worked on side by side: they find each other's operands in the cache."""

DONE = Handover(4, 288)
"""For each stage: both computing warpgroups have read it, and the warp that fetches may fill it again."""


def why_not_mosaic_gpu(w: Float[Array, "V D"], varying: bool) -> str | None:
    """The first thing of a call that these kernels cannot do, or None.

    Args:
      w: this device's table.
      varying: the operands vary over mesh axes.
    """
    reasons = {
        "its work under jax before 0.11.2": too_old(),
        "a dtype other than bfloat16": w.dtype != jnp.bfloat16,
        f"hidden states whose width is no multiple of {STEP}": w.shape[1] % STEP != 0,
        f"a table whose rows are no multiple of {STEP}": len(w) % STEP != 0,
        "shard_map with check_vma=True": varying,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def statistics(
    x: Float[Array, "M D"], w: Float[Array, "V D"], limit: Int[Array, "1"], temperature: float
) -> tuple[Float[Array, "C M"], Float[Array, "C M"], Float[Array, "C M"]]:
    """Of every 256 columns: the peak, Σ exp(z - peak) and Σ exp(z - peak) (z - peak); no columns from `limit` on."""
    scale = LOG2E / temperature

    def epilogue(products):
        peak = products.max(axis=1) * scale
        below = products * scale - _down(peak)
        weights = jnp.exp2(below)
        return None, (peak, weights.sum(axis=1), (weights * below).sum(axis=1))

    peak, s, t = _product(epilogue, x, w, limit, (), entries=None, sums=3, name="head_statistics")
    return peak / LOG2E, s, t / LOG2E


def logits(
    x: Float[Array, "M D"], w: Float[Array, "V D"], limit: Int[Array, "1"], temperature: float
) -> tuple[Float[Array, "M V"], Float[Array, "C M"], Float[Array, "C M"]]:
    """z in float32, `MASKED` from column `limit` on; of every 256 columns the peak and Σ exp(z - peak)."""

    def epilogue(products):
        z = products * (1 / temperature)
        peak = z.max(axis=1)
        return z, (peak, jnp.exp2((z - _down(peak)) * LOG2E).sum(axis=1))

    return _product(epilogue, x, w, limit, (), entries=jnp.float32, sums=2, name="head_logits")


def exponentials(
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    limit: Int[Array, "1"],
    anchor: Float[Array, "M"],
    temperature: float,
) -> tuple[Float[Array, "M V"], Float[Array, "C M"]]:
    """exp(z - anchor) in x's dtype, and its sums over every 256 columns; 0 from column `limit` on."""
    scale = LOG2E / temperature

    def epilogue(products, anchor):
        weights = jnp.exp2(products * scale - _down(anchor))
        return weights, (weights.sum(axis=1),)

    return _product(epilogue, x, w, limit, (anchor * LOG2E,), entries=x.dtype, sums=1, name="head_exponentials")


def gradient(
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    limit: Int[Array, "1"],
    lse: Float[Array, "M"],
    alpha: Float[Array, "M"],
    gamma: Float[Array, "M"],
    temperature: float,
) -> Float[Array, "M V"]:
    """p (alpha - gamma log p) with log p = z - lse, in x's dtype; 0 from column `limit` on."""
    scale = LOG2E / temperature

    def epilogue(products, lse, alpha, gamma):
        logp = products * scale - _down(lse)
        return jnp.exp2(logp) * (_down(alpha) - _down(gamma) * logp), ()

    rows = lse * LOG2E, alpha, gamma / LOG2E
    (d_logits,) = _product(epilogue, x, w, limit, rows, entries=x.dtype, sums=0, name="head_gradient")
    return d_logits


def _down(vector):
    return stretched(vector, (ROWS, COLUMNS), 0)


def _product(
    epilogue: Callable[..., tuple[jax.Array | None, tuple[jax.Array, ...]]],
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    limit: Int[Array, "1"],
    rows: tuple[Float[Array, "M"], ...],
    *,
    entries: jax.typing.DTypeLike | None,
    sums: int,
    name: str,
) -> tuple[jax.Array, ...]:
    """`epilogue(products, *rows) -> entries, sums` over all tiles: [M, V] where asked, and [⌈V/256⌉, M] for each sum.

    The epilogue gets products [64, 256] in float32, `MASKED` from column `limit` on; its entries leave in the dtype
    `entries`, None for none.
    """
    (M, D), V = x.shape, len(w)
    padded = -(-M // TALL) * TALL
    x, *rows = (jnp.pad(a, [(0, padded - M)] + [(0, 0)] * (a.ndim - 1)) for a in (x, *rows))
    axes = varying_axes((x, w, limit, rows))
    tiles = padded // TALL, -(-V // COLUMNS)
    scratch = dict(
        x_smem=plgpu.SMEM((STAGES, TALL, STEP), x.dtype, transforms=TRANSFORMS),
        w_smem=plgpu.SMEM((STAGES, COLUMNS, STEP), x.dtype, transforms=TRANSFORMS),
        here=plgpu.Barrier(num_barriers=STAGES, num_arrivals=2),
    )
    some = entries is not None
    if some:
        piece = PIECE // jnp.dtype(entries).itemsize
        swizzled = plgpu.TilingTransform((8, piece)), plgpu.SwizzleTransform(PIECE)
        scratch["out_smem"] = plgpu.SMEM((2, 2, ROWS, piece), entries, transforms=swizzled)
    results = plgpu.kernel(
        functools.partial(_kernel, epilogue=epilogue, rows=len(rows), tiles=tiles, steps=D // STEP),
        out_type=((typed_shape((padded, V), entries, axes),) if some else ())
        + (typed_shape((tiles[1], padded), jnp.float32, axes),) * sums,
        scratch_types=scratch,
        grid=(min(SMS, math.prod(tiles)),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        kernel_name=name,
    )(x, w, limit, *rows)
    return (*(r[:M] for r in results[:some]), *(r[:, :M] for r in results[some:]))


def _place(n, tiles):
    """Row and column of the n-th tile: `ABREAST` of them downwards, then on to the next column."""
    down, across = tiles
    band = lax.div(n, ABREAST * across)
    inside = n - band * (ABREAST * across)
    height = jnp.minimum(down - band * ABREAST, ABREAST)
    return band * ABREAST + lax.rem(inside, height), lax.div(inside, height)


def _kernel(
    x_ref, w_ref, limit_ref, *refs, x_smem, w_smem, here, out_smem=None, epilogue, rows, tiles, steps
):  # fmt: skip
    row_refs, results = refs[:rows], refs[rows:]
    entry_refs, sum_refs = ((), results) if out_smem is None else (results[:1], results[1:])
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    blocks = min(SMS, math.prod(tiles))

    def over_tiles(body):
        """Runs `body(steps before it, first row, column of tiles)` for the tiles of this block."""

        def one(turn, _):
            down, across = _place(sm + turn * blocks, tiles)
            body(turn * steps, down * TALL, across)

        lax.fori_loop(0, lax.div(math.prod(tiles) - sm + blocks - 1, blocks), one, None)

    @pl.when(warpgroup < 2)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        limit = limit_ref[0]
        for slot in range(STAGES):
            DONE.arrive(slot)

        def tile(before, first_row, across):
            at_rows = pl.ds(first_row + warpgroup * ROWS, ROWS)
            numbers = [plgpu.load(ref.at[at_rows], layout=BY_ROW, optimized=False) for ref in row_refs]

            def multiply(products):
                def step(k, _):
                    slot = lax.rem(before + k, STAGES)
                    plgpu.barrier_wait(here.at[slot])
                    plgpu.wgmma(products, x_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)], w_smem.at[slot].T)
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def previous():
                        DONE.arrive(lax.rem(before + k - 1, STAGES))

                lax.fori_loop(0, steps, step, None)
                plgpu.wgmma_wait(0)
                DONE.arrive(lax.rem(before + steps - 1, STAGES))
                return products[...]

            products = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
            column = plgpu.broadcasted_iota(jnp.int32, products.shape, 1, layout=WGMMA)
            products = jnp.where(column < limit - across * COLUMNS, products, MASKED)
            entries, sums = epilogue(products, *numbers)
            for ref, column_sum in zip(sum_refs, sums):
                ref[across, at_rows] = column_sum
            for ref in entry_refs:
                entries = entries.astype(ref.dtype)
                width = out_smem.shape[3]
                for piece in range(COLUMNS // width):
                    staged = out_smem.at[warpgroup, piece % 2]
                    columns = pl.ds(across * COLUMNS + piece * width, width)
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    staged[...] = entries[:, piece * width : (piece + 1) * width]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(staged, ref.at[at_rows, columns])

        over_tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def one_warp(warp):
            @pl.when(warp == 0)
            def all_tiles():
                def tile(before, first_row, across):
                    def step(k, _):
                        slot, part = lax.rem(before + k, STAGES), pl.ds(k * STEP, STEP)
                        x_tile = x_ref.at[pl.ds(first_row, TALL), part]
                        w_tile = w_ref.at[pl.ds(across * COLUMNS, COLUMNS), part]
                        DONE.wait(slot)
                        plgpu.copy_gmem_to_smem(x_tile, x_smem.at[slot], here.at[slot])
                        plgpu.copy_gmem_to_smem(w_tile, w_smem.at[slot], here.at[slot])

                    lax.fori_loop(0, steps, step, None)

                over_tiles(tile)
