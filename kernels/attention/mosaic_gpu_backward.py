"""Attention on Hopper GPUs: the backward pass, in two kernels that add nothing up across blocks of threads.

`_dq_kernel` owns tiles of queries as the forward pass does and walks over keys; it makes delta on the way.
`_dkv_kernel` owns a tile of 128 keys, 64 to a warpgroup, and walks over the queries of all heads that share them; a
warpgroup passes over those that only the other needs. Both compute the logits anew, which costs seven products instead
of five, and give the same bits every time.
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from dqjax.kernels.attention.intervals import ALIGNED, PART, STEP_KV, STEP_Q, TILE, IntervalPlan
from dqjax.kernels.attention.mask import Tokens, Variant
from dqjax.kernels.attention.mosaic_gpu import (
    Share,
    bent_products,
    columns_seen,
    forward,
    over_steps,
    part_of,
    tile_of,
    whole_tiles,
)
from dqjax.kernels.attention.vjp import Kernel
from dqjax.kernels.hopper import BY_COLUMN, BY_ROW, LOG2E, PARAMS, TRANSFORMS, WGMMA, Handover, stretched
from dqjax.kernels.varying import typed_shape, varying_axes

STAGES_KV, STAGES_Q = 2, 4
"""Blocks on their way or in use: of keys and values in the dq kernel, of queries in the other."""


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    plan: IntervalPlan,
    variant: Variant,
    lse: Float[Array, "B T N"],
    out: Float[Array, "B T N H"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """dq, dk, dv by the formulas of `vjp.py`, in the dtype of q."""
    del tokens
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    q, k, v, out, d_out = (whole_tiles(x) for x in (q, k, v, out, d_out.astype(q.dtype)))
    lse, d_lse = (whole_tiles(x).transpose(0, 2, 1) for x in (lse * LOG2E, d_lse))
    dq, delta = _dq((q, k, v, out, d_out, lse, d_lse, plan.lower, plan.upper), plan, variant)
    dk, dv = _dkv((q, k, v, d_out, lse, delta, plan.lower, plan.upper), plan.kv_tiles, variant)
    return dq[:, :T], dk[:, :S], dv[:, :S]


MOSAIC_GPU = Kernel(forward, backward)


def _dq(arrays, plan, variant):
    """dq, and delta by `vjp.py`, [B, N, T]."""
    q, k = arrays[:2]
    (B, T, N, H), K, axes = q.shape, k.shape[2], varying_axes(arrays)
    share = Share.of(N // K)
    return plgpu.kernel(
        functools.partial(_dq_kernel, variant=variant, group=N // K, share=share),
        out_type=(typed_shape(q.shape, q.dtype, axes), typed_shape((B, N, T), jnp.float32, axes)),
        scratch_types=dict(
            q_smem=plgpu.SMEM((2, PART, H), q.dtype, transforms=TRANSFORMS),
            out_smem=plgpu.SMEM((2, PART, H), q.dtype, transforms=TRANSFORMS),
            do_smem=plgpu.SMEM((2, PART, H), q.dtype, transforms=TRANSFORMS),
            k_smem=plgpu.SMEM((STAGES_KV, STEP_KV, H), q.dtype, transforms=TRANSFORMS),
            v_smem=plgpu.SMEM((STAGES_KV, STEP_KV, H), q.dtype, transforms=TRANSFORMS),
            mine_here=plgpu.Barrier(num_barriers=2, num_arrivals=3),
            k_here=plgpu.Barrier(num_barriers=STAGES_KV),
            v_here=plgpu.Barrier(num_barriers=STAGES_KV),
        ),
        grid=(N // share.heads, T // share.queries, B),
        grid_names=("head", "tile", "row"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        kernel_name="attention_dq",
    )(*arrays, share.tiles(plan))


K_DONE, V_DONE = Handover(4, 288), Handover(4 + STAGES_KV, 288)


def _dq_kernel(
    q_ref, k_ref, v_ref, out_ref, do_ref, lse_ref, d_lse_ref, lower_ref, upper_ref, tiles_ref, dq_ref, delta_ref,
    *, q_smem, out_smem, do_smem, k_smem, v_smem, mine_here, k_here, v_here, variant, group, share,
):  # fmt: skip
    row, item_head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    entry = tiles_ref, row, lax.axis_index("tile")
    tile, start, steps = tile_of(*entry)
    start *= ALIGNED

    @pl.when(warpgroup < 2)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        _, rows, head = share.block(row, tile, item_head, warpgroup)
        for slot in range(STAGES_KV):
            K_DONE.arrive(slot)
            V_DONE.arrive(slot)
        q_mine, do_mine = q_smem.at[warpgroup], do_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], q_mine, mine_here.at[warpgroup])
        plgpu.copy_gmem_to_smem(do_ref.at[row, rows, head], do_mine, mine_here.at[warpgroup])
        plgpu.copy_gmem_to_smem(out_ref.at[row, rows, head], out_smem.at[warpgroup], mine_here.at[warpgroup])
        lower, upper, lse, d_lse = (
            plgpu.load(ref, layout=BY_ROW, optimized=False)
            for ref in (
                lower_ref.at[row, rows], upper_ref.at[row, rows],
                lse_ref.at[row, head, rows], d_lse_ref.at[row, head, rows],
            )
        )  # fmt: skip
        plgpu.barrier_wait(mine_here.at[warpgroup])
        both = (plgpu.load(ref.at[warpgroup], layout=WGMMA).astype(jnp.float32) for ref in (out_smem, do_smem))
        delta = math.prod(both).sum(axis=1) - d_lse
        delta_ref[row, head, rows] = delta

        def all_steps(dq):
            def step(lower, upper, i, _):
                slot = lax.rem(i, STAGES_KV)
                plgpu.barrier_wait(k_here.at[slot])
                plgpu.barrier_wait(v_here.at[slot])

                def weights_and_slopes(products, d_weights):
                    plgpu.wgmma(products, q_mine, k_smem.at[slot].T)
                    plgpu.wgmma(d_weights, do_mine, v_smem.at[slot].T)
                    x, factor, slope = bent_products(plgpu.wgmma_accumulator_load(products, wait_n=1), variant)
                    weights = jnp.exp2(x * factor - stretched(lse, x.shape, 0))

                    if lower is not None or upper is not None:
                        see = columns_seen(x.shape, start + i * STEP_KV, lower, upper)
                        weights = jnp.where(see, weights, 0.0)
                    return weights if slope is None else weights * slope, d_weights[...]

                tile_type = plgpu.ACC((PART, STEP_KV), jnp.float32)
                weights, d_weights = pl.run_scoped(weights_and_slopes, tile_type, tile_type)
                V_DONE.arrive(slot)
                d_logits = weights * (d_weights - stretched(delta, weights.shape, 0))
                plgpu.wgmma(dq, d_logits.astype(q_smem.dtype), k_smem.at[slot])
                plgpu.wgmma_wait(0)
                K_DONE.arrive(slot)

            def pass_over(i, _):
                slot = lax.rem(i, STAGES_KV)
                plgpu.barrier_wait(k_here.at[slot])
                plgpu.barrier_wait(v_here.at[slot])
                V_DONE.arrive(slot)
                K_DONE.arrive(slot)

            mine = functools.partial(part_of, *entry, share.part(warpgroup))
            if share.heads == 1:
                lax.fori_loop(0, mine()[0], pass_over, None)
            over_steps(step, lower, upper, mine, None)
            if share.heads == 1:
                lax.fori_loop(mine()[-1], tile_of(*entry)[2], pass_over, None)
            return dq[...]

        dq = pl.run_scoped(all_steps, plgpu.ACC(q_mine.shape, jnp.float32))
        q_mine[...] = (dq * variant.scale).astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_mine, dq_ref.at[row, rows, head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")
        kv_head = lax.div(item_head * share.heads, group)

        @plgpu.warp_map
        def one_warp(warp):
            @pl.when(warp == 0)
            def all_steps():
                def step(i, _):
                    slot = lax.rem(i, STAGES_KV)
                    block = row, pl.ds(start + i * STEP_KV, STEP_KV), kv_head
                    V_DONE.wait(slot)
                    plgpu.copy_gmem_to_smem(v_ref.at[block], v_smem.at[slot], v_here.at[slot])
                    K_DONE.wait(slot)
                    plgpu.copy_gmem_to_smem(k_ref.at[block], k_smem.at[slot], k_here.at[slot])

                lax.fori_loop(0, steps, step, None)


def _dkv(arrays, tiles, variant):
    q, k = arrays[:2]
    N, (B, S, K, H) = q.shape[2], k.shape
    return plgpu.kernel(
        functools.partial(_dkv_kernel, variant=variant, group=N // K),
        out_type=(typed_shape(k.shape, k.dtype, varying_axes(arrays)),) * 2,
        scratch_types=dict(
            k_smem=plgpu.SMEM((2, PART, H), q.dtype, transforms=TRANSFORMS),
            v_smem=plgpu.SMEM((2, PART, H), q.dtype, transforms=TRANSFORMS),
            q_smem=plgpu.SMEM((STAGES_Q, STEP_Q, H), q.dtype, transforms=TRANSFORMS),
            do_smem=plgpu.SMEM((STAGES_Q, STEP_Q, H), q.dtype, transforms=TRANSFORMS),
            lse_smem=plgpu.SMEM((STAGES_Q, STEP_Q), jnp.float32),
            delta_smem=plgpu.SMEM((STAGES_Q, STEP_Q), jnp.float32),
            lower_smem=plgpu.SMEM((STAGES_Q, STEP_Q), jnp.int32),
            upper_smem=plgpu.SMEM((STAGES_Q, STEP_Q), jnp.int32),
            mine_here=plgpu.Barrier(num_barriers=2, num_arrivals=2),
            q_here=plgpu.Barrier(num_barriers=STAGES_Q, num_arrivals=4),
            do_here=plgpu.Barrier(num_barriers=STAGES_Q, num_arrivals=2),
        ),
        grid=(S // TILE, K, B),
        grid_names=("tile", "head", "row"),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        kernel_name="attention_dkv",
    )(*arrays, tiles)


Q_DONE, DO_DONE = Handover(4, 288), Handover(4 + STAGES_Q, 288)


def _dkv_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, lower_ref, upper_ref, tiles_ref, dk_ref, dv_ref,
    *, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, lower_smem, upper_smem, mine_here, q_here, do_here,
    variant, group,
):  # fmt: skip
    row, kv_head, warpgroup = (lax.axis_index(name) for name in ("row", "head", "warpgroup"))
    entry = tiles_ref, row, lax.axis_index("tile")
    tile, start, steps = tile_of(*entry)
    start *= ALIGNED

    @pl.when(warpgroup < 2)
    def compute():
        mine = functools.partial(part_of, *entry, warpgroup)  # read at each use: no register is left to hold it
        plgpu.set_max_registers(240, action="increase")
        first_key = tile * TILE + warpgroup * PART
        keys = pl.ds(first_key, PART)
        k_mine, v_mine = k_smem.at[warpgroup], v_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(k_ref.at[row, keys, kv_head], k_mine, mine_here.at[warpgroup])
        plgpu.copy_gmem_to_smem(v_ref.at[row, keys, kv_head], v_mine, mine_here.at[warpgroup])
        for slot in range(STAGES_Q):
            Q_DONE.arrive(slot)
            DO_DONE.arrive(slot)
        plgpu.barrier_wait(mine_here.at[warpgroup])

        def all_steps(dk, dv):
            def step(before, i, _):
                slot = lax.rem(before + i, STAGES_Q)
                plgpu.barrier_wait(q_here.at[slot])
                plgpu.barrier_wait(do_here.at[slot])

                def both(products, d_weights):
                    plgpu.wgmma(products, k_mine, q_smem.at[slot].T)
                    plgpu.wgmma(d_weights, v_mine, do_smem.at[slot].T)
                    lse = plgpu.load(lse_smem.at[slot], layout=BY_COLUMN)
                    x, factor, slope = bent_products(plgpu.wgmma_accumulator_load(products, wait_n=1), variant)
                    weights = jnp.exp2(x * factor - stretched(lse, x.shape, 1))

                    def edge():
                        key = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=WGMMA) + first_key
                        lower = plgpu.load(lower_smem.at[slot], layout=BY_COLUMN)
                        seen = jnp.where(key >= stretched(lower, x.shape, 1), weights, 0.0)
                        upper = plgpu.load(upper_smem.at[slot], layout=BY_COLUMN)
                        return jnp.where(key < stretched(upper, x.shape, 1), seen, 0.0)

                    weights = lax.cond((i < mine()[1]) | (i >= mine()[2]), edge, lambda: weights)
                    plgpu.wgmma(dv, weights.astype(q_smem.dtype), do_smem.at[slot])
                    delta = plgpu.load(delta_smem.at[slot], layout=BY_COLUMN)
                    d_logits = weights * (
                        plgpu.wgmma_accumulator_load(d_weights, wait_n=1) - stretched(delta, x.shape, 1)
                    )
                    return d_logits if slope is None else d_logits * slope

                tile_type = plgpu.ACC((PART, STEP_Q), jnp.float32)
                d_logits = pl.run_scoped(both, tile_type, tile_type)
                plgpu.wgmma(dk, d_logits.astype(q_smem.dtype), q_smem.at[slot])
                plgpu.wgmma_wait(1)
                DO_DONE.arrive(slot)
                plgpu.wgmma_wait(0)
                Q_DONE.arrive(slot)

            def pass_over(before, i, _):
                slot = lax.rem(before + i, STAGES_Q)
                plgpu.barrier_wait(q_here.at[slot])
                plgpu.barrier_wait(do_here.at[slot])
                DO_DONE.arrive(slot)
                Q_DONE.arrive(slot)

            def one_head(n, _):
                before = n * tile_of(*entry)[2]
                lax.fori_loop(0, mine()[0], functools.partial(pass_over, before), None)
                lax.fori_loop(mine()[0], mine()[3], functools.partial(step, before), None)
                lax.fori_loop(mine()[3], tile_of(*entry)[2], functools.partial(pass_over, before), None)

            lax.fori_loop(0, group, one_head, None)
            return dk[...], dv[...]

        tile_type = plgpu.ACC(k_mine.shape, jnp.float32)
        dk, dv = pl.run_scoped(all_steps, tile_type, tile_type)
        k_mine[...] = (dk * variant.scale).astype(q_smem.dtype)
        v_mine[...] = dv.astype(q_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_mine, dk_ref.at[row, keys, kv_head])
        plgpu.copy_smem_to_gmem(v_mine, dv_ref.at[row, keys, kv_head])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def one_warp(warp):
            @pl.when(warp == 0)
            def all_steps():
                def step(count, _):
                    i, slot = lax.rem(count, steps), lax.rem(count, STAGES_Q)
                    head, queries = kv_head * group + lax.div(count, steps), pl.ds(start + i * STEP_Q, STEP_Q)
                    Q_DONE.wait(slot)
                    plgpu.copy_gmem_to_smem(q_ref.at[row, queries, head], q_smem.at[slot], q_here.at[slot])
                    plgpu.copy_gmem_to_smem(lse_ref.at[row, head, queries], lse_smem.at[slot], q_here.at[slot])
                    plgpu.copy_gmem_to_smem(lower_ref.at[row, queries], lower_smem.at[slot], q_here.at[slot])
                    plgpu.copy_gmem_to_smem(upper_ref.at[row, queries], upper_smem.at[slot], q_here.at[slot])
                    DO_DONE.wait(slot)
                    plgpu.copy_gmem_to_smem(do_ref.at[row, queries, head], do_smem.at[slot], do_here.at[slot])
                    plgpu.copy_gmem_to_smem(delta_ref.at[row, head, queries], delta_smem.at[slot], do_here.at[slot])

                lax.fori_loop(0, steps * group, step, None)
