"""Attention on Hopper GPUs (sm90) in Pallas's Mosaic GPU dialect: the forward pass.

A block of threads owns a tile of 128 queries of one head. Two warpgroups compute 64 queries each, taking turns at the
tensor cores (one multiplies while the other does its softmax, Shah et al., FlashAttention-3, 2024); a third fetches the
next keys and values. Only the keys that the plan lists are fetched, and only blocks on the edge of a query's interval
are masked.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dqjax.kernels.attention.intervals import ALIGNED, OUT_OF_ORDER, STEP_KV, TILE, IntervalPlan
from dqjax.kernels.attention.mask import MASKED, Tokens, Variant
from dqjax.kernels.varying import typed_shape, varying_axes

LOG2E = math.log2(math.e)
ROWS = TILE // 2
"""Rows of a warpgroup."""

STAGES = 2
"""Blocks of keys and values on their way or in use."""

PARAMS = plgpu.CompilerParams(approx_math=True)
WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    plan: IntervalPlan,
    variant: Variant,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Output and lse; NaN in rows that are out of order."""
    del tokens
    (B, T, N, H), K = q.shape, k.shape[2]
    q, k, v = (whole_tiles(x) for x in (q, k, v))
    tiles, axes = q.shape[1] // TILE, varying_axes((q, k, v, plan))
    out, lse = plgpu.kernel(
        functools.partial(_forward_kernel, variant=variant, group=N // K),
        out_type=(typed_shape(q.shape, q.dtype, axes), typed_shape((B, N, q.shape[1]), jnp.float32, axes)),
        scratch_types=dict(
            q_smem=plgpu.SMEM((2, ROWS, H), q.dtype, transforms=TRANSFORMS),
            k_smem=plgpu.SMEM((STAGES, STEP_KV, H), q.dtype, transforms=TRANSFORMS),
            v_smem=plgpu.SMEM((STAGES, STEP_KV, H), q.dtype, transforms=TRANSFORMS),
            lse_smem=plgpu.SMEM((2, ROWS), jnp.float32),
            q_here=plgpu.Barrier(num_barriers=2),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_done=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            v_done=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            turn=plgpu.Barrier(num_arrivals=2),
        ),
        grid=(N, tiles, B),
        grid_names=("head", "tile", "row"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        kernel_name="attention_forward",
    )(q, k, v, plan.lower, plan.upper, plan.q_tiles)
    return out[:, :T], lse[:, :, :T].transpose(0, 2, 1)


def why_not_mosaic_gpu(dtype: jax.typing.DTypeLike, head_size: int, scale: float, *, kv_positions: bool) -> str | None:
    """The first thing of a call that these kernels cannot do, or None."""
    reasons = {
        "positions of the keys": kv_positions,
        "a dtype other than bfloat16 and float16": dtype not in (jnp.bfloat16, jnp.float16),
        "a head size other than 64 and 128": head_size not in (64, 128),
        "a scale that is not positive": scale <= 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def whole_tiles(x: Float[Array, "B T ..."]) -> Float[Array, "B T2 ..."]:
    """Lengthens the rows with zeros to whole tiles."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE)] + [(0, 0)] * (x.ndim - 2))


def tile_work(table, row, index):
    """The entry of a plan's tile table: tile, start, steps, whole_from, whole_to."""
    tile, start, *steps = (table[row, index, i] for i in range(5))
    return tile, pl.multiple_of(start, ALIGNED), *steps


def stretched(x, shape, dimension):
    """A vector along `dimension` of a tile."""
    return lax.broadcast_in_dim(x, shape, [dimension])


def columns_seen(shape, first_column, lower, upper):
    """Where lower <= column < upper, with a column's number counted from `first_column` and bounds by row."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)
    return (column >= stretched(lower - first_column, shape, 0)) & (column < stretched(upper - first_column, shape, 0))


def bent_products(products, variant: Variant):
    """x, factor and slope: the logits are x · factor in units of log 2, and slope is their derivative in scale · q·k.

    The factor is left out so that it joins the subtraction before the exponential in one instruction; slope is None
    without a cap.
    """
    if variant.softcap is None:
        return products, variant.scale * LOG2E, None
    bent = jnp.tanh(products * (variant.scale / variant.softcap))
    return bent, variant.softcap * LOG2E, 1 - bent * bent


def _forward_kernel(
    q_ref, k_ref, v_ref, lower_ref, upper_ref, tiles_ref, out_ref, lse_ref,
    *, q_smem, k_smem, v_smem, lse_smem, q_here, k_here, v_here, k_done, v_done, turn, variant, group,
):  # fmt: skip
    row, head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    tile, start, steps, whole_from, whole_to = tile_work(tiles_ref, row, lax.axis_index("tile"))

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(warpgroup < 2)
    def compute():
        plgpu.set_max_registers(232, action="increase")
        rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
        q_mine = q_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_mine, q_here.at[warpgroup])
        lower, upper = (
            plgpu.load(ref.at[row, rows], layout=BY_ROW, optimized=False) for ref in (lower_ref, upper_ref)
        )
        H = q_smem.shape[-1]
        peak = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), BY_ROW)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
        acc = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), WGMMA)
        plgpu.barrier_wait(q_here.at[warpgroup])

        @pl.when(steps > 0)
        def first_keys():
            plgpu.barrier_wait(k_here.at[0])

        pl.when(warpgroup == 1)(take_turns)

        def step(i, carry, masked):
            acc, peak, total = carry
            slot = lax.rem(i, STAGES)

            def multiply_keys(products):
                plgpu.wgmma(products, q_mine, k_smem.at[slot].T)
                take_turns()
                return products[...]

            products = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, STEP_KV), jnp.float32))
            plgpu.barrier_arrive(k_done.at[slot])
            x, factor, _ = bent_products(products, variant)
            if masked:
                see = columns_seen(x.shape, start + i * STEP_KV, lower, upper)
                x = jnp.where(see, x, -jnp.inf)
            new_peak = jnp.maximum(peak, x.max(axis=1) * factor)
            shrink = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(x * factor - stretched(new_peak, x.shape, 0))
            acc *= stretched(shrink, acc.shape, 0)
            total = total * shrink + weights.sum(axis=1)
            weights = weights.astype(q_smem.dtype)
            # Keeps the softmax on this side of the barriers.
            acc, total, new_peak, weights = lax.optimization_barrier((acc, total, new_peak, weights))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_here.at[slot])
            plgpu.barrier_wait(turn)

            def multiply_values(acc):
                plgpu.wgmma(acc, weights, v_smem.at[slot])

                @pl.when(i + 1 < steps)
                def next_keys():
                    plgpu.barrier_wait(k_here.at[lax.rem(i + 1, STAGES)])

            acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_done.at[slot])
            return acc, new_peak, total

        edge, whole = (functools.partial(step, masked=masked) for masked in (True, False))
        carry = lax.fori_loop(0, whole_from, edge, (acc, peak, total))
        carry = lax.fori_loop(whole_from, whole_to, whole, carry)
        acc, peak, total = lax.fori_loop(whole_to, steps, edge, carry)
        pl.when(warpgroup == 0)(take_turns)

        some = total > 0
        inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
        inverse = jnp.where(lower == OUT_OF_ORDER, jnp.nan, inverse)
        q_mine[...] = (acc * stretched(inverse, acc.shape, 0)).astype(q_smem.dtype)
        lse = peak * (1 / LOG2E) + jnp.log(jnp.where(some, total, 1.0))
        lse_smem[warpgroup] = jnp.where(some, lse, MASKED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_mine, out_ref.at[row, rows, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, rows])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, group)

        @pl.loop(0, steps)
        def step(i):
            slot = lax.rem(i, STAGES)
            block = row, pl.ds(start + i * STEP_KV, STEP_KV), kv_head
            for ref, smem, here, done in ((k_ref, k_smem, k_here, k_done), (v_ref, v_smem, v_here, v_done)):

                @pl.when(i >= STAGES)
                def used():
                    plgpu.barrier_wait(done.at[slot])

                plgpu.copy_gmem_to_smem(ref.at[block], smem.at[slot], here.at[slot])
