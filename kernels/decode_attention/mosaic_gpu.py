"""Decode attention on Hopper GPUs (sm90), in Pallas's Mosaic GPU dialect.

The cache is read once, as fast as memory gives it, and the arithmetic hides behind. A block of threads owns a part of the
keys of a sequence's key-value head. One warpgroup multiplies the head's group of queries, in the first of the 64 rows of
a tensor-core product; a second fetches keys and values ahead of it, up to the sequence's length and no further. Two such
blocks share a multiprocessor, so that one fetches while the other begins or ends. The parts are put together by their lse.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.mask import MASKED, Variant
from dqjax.kernels.attention.mosaic_gpu import (
    BY_ROW,
    LOG2E,
    PARAMS,
    SMS,
    TRANSFORMS,
    WGMMA,
    bent_products,
    stretched,
    too_old,
)
from dqjax.kernels.varying import typed_shape, varying_axes

ROWS = 64
"""Of a product; those of the group are in use."""

STEP, STAGES = 64, 2
"""Slots fetched at once, and how many such blocks are on their way or in use."""

PARTS = (2048, 1024, 512, 256)
"""Slots of a part: the most that leaves some parts for every multiprocessor."""

LINES = 8
"""Slots and queries are copied in whole multiples of this."""

WIDE = (plgpu.TilingTransform((LINES, 32)), plgpu.SwizzleTransform(128))


def why_not_mosaic_gpu(dtype: jax.typing.DTypeLike, head_size: int, slots: int) -> str | None:
    """The first thing of a call that this kernel cannot do, or None."""
    reasons = {
        "its work under jax before 0.11.2": too_old(),
        "a dtype other than bfloat16 and float16": dtype not in (jnp.bfloat16, jnp.float16),
        "a head size other than 64 and 128": head_size not in (64, 128),
        f"a cache whose slots are no multiple of {LINES}": slots % LINES != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@functools.partial(jax.jit, static_argnames="variant")  # layers share what is traced and lowered
def mosaic_gpu_decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K H"],
    lengths: Int[Array, "B"],
    variant: Variant,
) -> Float[Array, "B N H"]:
    """As the reference, with the weights rounded to the cache's dtype; slots past `lengths` must be finite."""
    (B, N, H), (S, K) = q.shape, k_cache.shape[1:3]
    refusal = why_not_mosaic_gpu(q.dtype, H, S)
    if refusal is None and N // K > ROWS:
        refusal = f"more than {ROWS} queries a key-value head"
    if refusal:
        raise NotImplementedError(f"decode_attention: backend 'mosaic_gpu' cannot do {refusal}; use 'xla'")
    group = N // K
    kept = -(-group // LINES) * LINES
    part = next((part for part in PARTS if B * K * -(-S // part) >= 4 * SMS), PARTS[-1])
    parts = -(-S // part)
    queries = jnp.pad(q.reshape(B, K, group, H), ((0, 0), (0, 0), (0, kept - group), (0, 0)))
    upper = lengths.astype(jnp.int32)
    lower = jnp.zeros_like(upper) if variant.window is None else jnp.maximum(upper - variant.window, 0)
    axes = varying_axes((q, k_cache, v_cache, lengths))
    out, lse = plgpu.kernel(
        functools.partial(_kernel, variant=variant, part_size=part, kept=kept),
        out_type=(
            typed_shape((B, K, parts, kept, H), jnp.float32, axes),
            typed_shape((B, K, parts, ROWS), jnp.float32, axes),
        ),
        scratch_types=dict(
            q_smem=plgpu.SMEM((ROWS, H), q.dtype, transforms=TRANSFORMS),
            k_smem=plgpu.SMEM((STAGES, STEP, H), q.dtype, transforms=TRANSFORMS),
            v_smem=plgpu.SMEM((STAGES, STEP, H), q.dtype, transforms=TRANSFORMS),
            out_smem=plgpu.SMEM((ROWS, H), jnp.float32, transforms=WIDE),
            lse_smem=plgpu.SMEM((ROWS,), jnp.float32),
            q_here=plgpu.Barrier(),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
            k_done=plgpu.Barrier(num_barriers=STAGES),
            v_done=plgpu.Barrier(num_barriers=STAGES),
        ),
        grid=(B, parts, K),
        grid_names=("sequence", "part", "head"),
        num_threads=2,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        kernel_name="decode_attention",
    )(queries, k_cache, v_cache, lower, upper)
    out, lse = out[:, :, :, :group], lse[:, :, :, :group]
    return (out[:, :, 0] if parts == 1 else _joined(out, lse)).reshape(B, N, H).astype(q.dtype)


def _joined(out: Float[Array, "B K P G H"], lse: Float[Array, "B K P G"]) -> Float[Array, "B K G H"]:
    """The parts weighed by what each holds of the sum of exponentials; 0 where none holds any."""
    weights = jnp.where(lse > MASKED, jnp.exp(lse - jnp.max(lse, axis=2, keepdims=True)), 0)
    total = jnp.sum(weights, axis=2)
    return jnp.einsum("BKPG,BKPGH->BKGH", weights, out) / jnp.where(total > 0, total, 1)[..., None]


def _kernel(
    q_ref, k_ref, v_ref, lower_ref, upper_ref, out_ref, lse_ref,
    *, q_smem, k_smem, v_smem, out_smem, lse_smem, q_here, k_here, v_here, k_done, v_done, variant, part_size, kept,
):  # fmt: skip
    sequence, part, head, warpgroup = (lax.axis_index(name) for name in ("sequence", "part", "head", "warpgroup"))
    lower, upper = lower_ref[sequence], upper_ref[sequence]
    first = lax.max(part * part_size, lax.div(lower, STEP) * STEP)
    steps = lax.max(lax.div(lax.min((part + 1) * part_size, upper) - first + STEP - 1, STEP), 0)
    first_step = lax.div(first, STEP)

    @pl.when(warpgroup == 0)
    def compute():
        # The rows behind the group hold what was there: nothing of theirs reaches another row, or memory.
        plgpu.copy_gmem_to_smem(q_ref.at[sequence, head], q_smem.at[pl.ds(0, kept)], q_here)
        peak = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), BY_ROW)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
        acc = plgpu.layout_cast(jnp.zeros(q_smem.shape, jnp.float32), WGMMA)
        plgpu.barrier_wait(q_here)

        def step(i, carry):
            acc, peak, total = carry
            slot = lax.rem(i, STAGES)
            plgpu.barrier_wait(k_here.at[slot])

            def multiply_keys(products):
                plgpu.wgmma(products, q_smem, k_smem.at[slot].T)
                return products[...]

            products = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, STEP), jnp.float32))
            plgpu.barrier_arrive(k_done.at[slot])
            x, factor, _ = bent_products(products, variant)
            column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=WGMMA) + (first_step + i) * STEP
            x = jnp.where((column >= lower) & (column < upper), x, -jnp.inf)
            new_peak = jnp.maximum(peak, x.max(axis=1) * factor)
            shrink = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(x * factor - stretched(new_peak, x.shape, 0))
            acc *= stretched(shrink, acc.shape, 0)
            total = total * shrink + weights.sum(axis=1)
            weights = weights.astype(q_smem.dtype)
            plgpu.barrier_wait(v_here.at[slot])

            def multiply_values(acc):
                plgpu.wgmma(acc, weights, v_smem.at[slot])

            acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_done.at[slot])
            return acc, new_peak, total

        acc, peak, total = lax.fori_loop(0, steps, step, (acc, peak, total))
        some = total > 0
        total = jnp.where(some, total, 1.0)
        lse_smem[...] = jnp.where(some, peak * (1 / LOG2E) + jnp.log(total), MASKED)
        out_smem[...] = acc * stretched(1 / total, acc.shape, 0)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, kept)], out_ref.at[sequence, head, part])
        plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[sequence, head, part])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 1)
    def fetch():
        def step(i, _):
            slot = lax.rem(i, STAGES)
            block = sequence, pl.ds((first_step + i) * STEP, STEP), head
            for ref, smem, here, done in ((k_ref, k_smem, k_here, k_done), (v_ref, v_smem, v_here, v_done)):

                @pl.when(i >= STAGES)
                def used():
                    plgpu.barrier_wait(done.at[slot])

                plgpu.copy_gmem_to_smem(ref.at[block], smem.at[slot], here.at[slot])

        lax.fori_loop(0, steps, step, None)
