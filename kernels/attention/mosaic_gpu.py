"""Attention on Hopper GPUs (sm90) in Pallas's Mosaic GPU dialect: the forward pass.

A block of threads owns a tile of 64 queries of two heads that share their keys, or, where an odd number of heads do, of
128 queries of one head. Two warpgroups compute 64 queries each, taking turns at the tensor cores (one multiplies while
the other does its softmax, Shah et al., FlashAttention-3, 2024); a third fetches the next keys and values. A turn is the
product with the last block's values and, right behind it, the one with the next block's keys. Only the keys that the
plan lists are fetched; a warpgroup masks the blocks on the edge of a query's interval and passes over those that only
the other needs.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.intervals import ALIGNED, OUT_OF_ORDER, PART, STEP_KV, TILE, IntervalPlan
from dqjax.kernels.attention.mask import MASKED, Tokens, Variant
from dqjax.kernels.hopper import BY_ROW, LOG2E, PARAMS, SMS, TRANSFORMS, WGMMA, Handover, stretched, too_old
from dqjax.kernels.varying import typed_shape, varying_axes

STAGES = 2
"""Blocks of keys and values on their way or in use."""

@functools.partial(jax.jit, static_argnames="variant")  # layers share what is traced and lowered
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
    axes = varying_axes((q, k, v, plan))
    share = Share.of(N // K)
    work = Work(N // share.heads, q.shape[1] // share.queries, B)
    out, lse = plgpu.kernel(
        functools.partial(_forward_kernel, variant=variant, group=N // K, work=work, share=share),
        out_type=(typed_shape(q.shape, q.dtype, axes), typed_shape((B, N, q.shape[1]), jnp.float32, axes)),
        scratch_types=dict(
            q_smem=plgpu.SMEM((TILE, H), q.dtype, transforms=TRANSFORMS),
            k_smem=plgpu.SMEM((STAGES, STEP_KV, H), q.dtype, transforms=TRANSFORMS),
            v_smem=plgpu.SMEM((STAGES, STEP_KV, H), q.dtype, transforms=TRANSFORMS),
            out_smem=plgpu.SMEM((2, PART, H), q.dtype, transforms=TRANSFORMS),
            lse_smem=plgpu.SMEM((2, PART), jnp.float32),
            q_here=plgpu.Barrier(num_arrivals=2),
            k_here=plgpu.Barrier(num_barriers=STAGES),
            v_here=plgpu.Barrier(num_barriers=STAGES),
        ),
        grid=(min(SMS, math.prod(work)),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        kernel_name="attention_forward",
    )(q, k, v, plan.lower, plan.upper, share.tiles(plan))
    return out[:, :T], lse[:, :, :T].transpose(0, 2, 1)


class Share(NamedTuple):
    """How the two computing warpgroups divide an item: a tile of PART queries of two heads, or of TILE queries of one.

    Two heads of the same keys need the same steps, so that neither warpgroup waits for the other and fewer products are
    masked away.
    """

    heads: int

    @classmethod
    def of(cls, group: int) -> "Share":
        """For `group` heads that share their keys."""
        return cls(2 if group % 2 == 0 else 1)

    @property
    def queries(self) -> int:
        return TILE // self.heads

    def tiles(self, plan: IntervalPlan) -> Int[Array, "B I C"]:
        return plan.q_parts if self.heads == 2 else plan.q_tiles

    def part(self, warpgroup):
        """The number of a warpgroup's part in the plan's entry."""
        return 0 if self.heads == 2 else warpgroup

    def block(self, row, tile, item_head, warpgroup):
        """row, queries and head of a warpgroup."""
        if self.heads == 2:
            return row, pl.ds(tile * PART, PART), item_head * 2 + warpgroup
        return row, pl.ds(tile * TILE + warpgroup * PART, PART), item_head


class Work(NamedTuple):
    """The tiles of all heads and rows, dealt to the multiprocessors in turn.

    Tiles of a head run side by side and share its keys in the cache. They come by falling work for one head and by
    rising work for the next, so that everyone's share weighs the same; the last head's shortest tiles come last.
    """

    heads: int
    tiles: int
    rows: int

    def share(self, sm):
        """How many of them fall to a multiprocessor."""
        return lax.div(math.prod(self) - sm + SMS - 1, SMS)

    def item(self, sm, turn, read):
        """head, row, and what `read(row, index)` gives of the plan's entry; those of the last item past the end."""
        n = jnp.minimum(sm + turn * SMS, math.prod(self) - 1)
        row, index, head = lax.rem(n, self.rows), lax.rem(n // self.rows, self.tiles), n // (self.rows * self.tiles)
        rising = lax.rem(self.heads - 1 - head, 2) == 1
        return head, row, *read(row, jnp.where(rising, self.tiles - 1 - index, index))


def over_items(work: Work, sm, read, body):
    """Runs `body(item, steps before it) -> None` for the items of a multiprocessor, reading one entry ahead."""

    def one(turn, carry):
        before, (head, row, tile, start, steps, *part) = carry
        upcoming = work.item(sm, turn + 1, read)
        body((head, row, tile, start * ALIGNED, steps, *part), before)
        return before + steps, upcoming

    lax.fori_loop(0, work.share(sm), one, (jnp.int32(0), work.item(sm, jnp.int32(0), read)))


def why_not_mosaic_gpu(dtype: jax.typing.DTypeLike, head_size: int, scale: float, *, kv_positions: bool) -> str | None:
    """The first thing of a call that these kernels cannot do, or None."""
    reasons = {
        "its work under jax before 0.11.2": too_old(),
        "positions of the keys": kv_positions,
        "a dtype other than bfloat16 and float16": dtype not in (jnp.bfloat16, jnp.float16),
        "a head size other than 64 and 128": head_size not in (64, 128),
        "a scale that is not positive": scale <= 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def whole_tiles(x: Float[Array, "B T ..."]) -> Float[Array, "B T2 ..."]:
    """Lengthens the rows with zeros to whole tiles."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE)] + [(0, 0)] * (x.ndim - 2))


def tile_of(table, row, index):
    """tile, start in units of `ALIGNED`, and steps of an entry of a plan's table.

    Only a product with `ALIGNED` next to its use shows the compiler that a copy is aligned.
    """
    return tuple(table[row, index, i] for i in range(3))


def part_of(table, row, index, part):
    """begin, lower_to, upper_from and end of a part of a tile."""
    return tuple(table[row, index, 3 + 4 * part + i] for i in range(4))


def over_steps(step, lower, upper, part, carry):
    """Runs `step(lower, upper, i, carry) -> carry` for the steps of a part, with None for bounds that need no test.

    `part() -> begin, lower_to, upper_from, end` is called at each use, so that no register holds what can be read.
    """

    def ranges():
        begin, lower_to, upper_from, end = part()
        first, last = jnp.minimum(lower_to, upper_from), jnp.maximum(lower_to, upper_from)
        return (begin, first), (first, upper_from), (first, lower_to), (last, end)

    for i, bounds in enumerate(((lower, None), (None, None), (lower, upper), (None, upper))):
        carry = lax.fori_loop(*ranges()[i], functools.partial(step, *bounds), carry)
    return carry


def columns_seen(shape, first_column, lower, upper):
    """Where lower <= column < upper, with columns counted from `first_column` and bounds by row; None is no bound."""
    column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA) + first_column
    tests = []
    if lower is not None:
        tests.append(column >= stretched(lower, shape, 0))
    if upper is not None:
        tests.append(column < stretched(upper, shape, 0))
    return functools.reduce(jnp.logical_and, tests)


def bent_products(products, variant: Variant):
    """x, factor and slope: the logits are x · factor in units of log 2, and slope is their derivative in scale · q·k.

    The factor is left out so that it joins the subtraction before the exponential in one instruction; slope is None
    without a cap.
    """
    if variant.softcap is None:
        return products, variant.scale * LOG2E, None
    bent = jnp.tanh(products * (variant.scale / variant.softcap))
    return bent, variant.softcap * LOG2E, 1 - bent * bent


TURN = Handover(4, 256)
"""One for each computing warpgroup; its owner waits on it and the other arrives."""

Q_DONE = Handover(6, 288)
K_DONE, V_DONE = Handover(7, 288), Handover(7 + STAGES, 288)
"""Shared memory that both computing warpgroups have read, for the warp that fetches to fill again."""


def _forward_kernel(
    q_ref, k_ref, v_ref, lower_ref, upper_ref, tiles_ref, out_ref, lse_ref,
    *, q_smem, k_smem, v_smem, out_smem, lse_smem, q_here, k_here, v_here, variant, group, work, share,
):  # fmt: skip
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")

    @pl.when(warpgroup < 2)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        q_mine = q_smem.at[pl.ds(warpgroup * PART, PART)]
        Q_DONE.arrive()
        for slot in range(STAGES):
            K_DONE.arrive(slot)
            V_DONE.arrive(slot)

        @pl.when(warpgroup == 1)
        def second():
            TURN.arrive(0)

        def item(entry, before):
            item_head, row, tile, start, steps, *part = entry
            _, rows, head = share.block(row, tile, item_head, warpgroup)
            lower, upper = (
                plgpu.load(ref.at[row, rows], layout=BY_ROW, optimized=False) for ref in (lower_ref, upper_ref)
            )

            def softmax(products, i, lower, upper, peak):
                """The block's weights and their new peak."""
                x, factor, _ = bent_products(products, variant)
                if lower is not None or upper is not None:
                    see = columns_seen(x.shape, start + i * STEP_KV, lower, upper)
                    x = jnp.where(see, x, -jnp.inf)
                new_peak = jnp.maximum(peak, x.max(axis=1) * factor)
                return jnp.exp2(x * factor - stretched(new_peak, x.shape, 0)), new_peak

            def my_turn(i):
                """The first step of a tile needs none."""

                @pl.when(i > 0)
                def wait():
                    TURN.wait(warpgroup)

            def other_turn(i):
                @pl.when(i > 0)
                def arrive():
                    TURN.arrive(1 - warpgroup)

            def pass_over(i, _):
                slot = lax.rem(before + i, STAGES)
                plgpu.barrier_wait(k_here.at[slot])
                K_DONE.arrive(slot)
                plgpu.barrier_wait(v_here.at[slot])
                V_DONE.arrive(slot)
                my_turn(i)
                other_turn(i)

            def all_steps(acc):
                def tile_with_work(_, carry):
                    begin, lower_to, upper_from, end = part
                    plgpu.barrier_wait(q_here)
                    if share.heads == 2:
                        begin, end = 0, steps
                    else:
                        begin = jnp.minimum(begin, steps - 1)
                        end = jnp.maximum(end, begin + 1)
                        lax.fori_loop(0, begin, pass_over, None)

                    first = lax.rem(before + begin, STAGES)
                    plgpu.barrier_wait(k_here.at[first])
                    my_turn(begin)

                    def multiply_keys(products):
                        plgpu.wgmma(products, q_mine, k_smem.at[first].T)
                        other_turn(begin)
                        return products[...]

                    products = pl.run_scoped(multiply_keys, plgpu.ACC((PART, STEP_KV), jnp.float32))
                    K_DONE.arrive(first)
                    weights, peak = softmax(products, begin, lower, upper, carry[0])
                    total = weights.sum(axis=1)
                    weights = weights.astype(q_smem.dtype)

                    def step(lower, upper, i, carry):
                        weights, peak, total = carry
                        slot, last = lax.rem(before + i, STAGES), lax.rem(before + i - 1, STAGES)
                        plgpu.barrier_wait(k_here.at[slot])
                        plgpu.barrier_wait(v_here.at[last])
                        TURN.wait(warpgroup)

                        def both(products):
                            plgpu.wgmma(acc, weights, v_smem.at[last])
                            plgpu.wgmma(products, q_mine, k_smem.at[slot].T)
                            TURN.arrive(1 - warpgroup)
                            plgpu.wgmma_wait(1)
                            V_DONE.arrive(last)
                            return products[...]

                        products = pl.run_scoped(both, plgpu.ACC((PART, STEP_KV), jnp.float32))
                        K_DONE.arrive(slot)
                        weights, new_peak = softmax(products, i, lower, upper, peak)
                        shrink = jnp.exp2(peak - new_peak)
                        total = total * shrink + weights.sum(axis=1)
                        weights = weights.astype(q_smem.dtype)
                        values = acc[...]
                        values *= stretched(shrink, values.shape, 0)
                        # Keeps the softmax on this side of the barriers.
                        values, total, new_peak, weights = lax.optimization_barrier((values, total, new_peak, weights))
                        acc[...] = values
                        return weights, new_peak, total

                    bounds = begin + 1, *(jnp.maximum(bound, begin + 1) for bound in (lower_to, upper_from)), end
                    weights, peak, total = over_steps(step, lower, upper, lambda: bounds, (weights, peak, total))
                    # Before the last product: the first warpgroup may need the next queries to give the second its turn.
                    Q_DONE.arrive()
                    last = lax.rem(before + end - 1, STAGES)
                    plgpu.barrier_wait(v_here.at[last])
                    plgpu.wgmma(acc, weights, v_smem.at[last])
                    plgpu.wgmma_wait(0)
                    V_DONE.arrive(last)
                    if share.heads == 1:
                        lax.fori_loop(end, steps, pass_over, None)
                    return peak, total

                peak = plgpu.layout_cast(jnp.full((PART,), MASKED, jnp.float32), BY_ROW)
                total = plgpu.layout_cast(jnp.zeros((PART,), jnp.float32), BY_ROW)
                # Once, or not at all: an item without work takes no queries and no turns.
                peak, total = lax.fori_loop(0, jnp.minimum(steps, 1), tile_with_work, (peak, total))
                return acc[...], peak, total

            acc, peak, total = pl.run_scoped(all_steps, plgpu.ACC(out_smem.shape[1:], jnp.float32))

            some = total > 0
            inverse = jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0)
            inverse = jnp.where(lower == OUT_OF_ORDER, jnp.nan, inverse)
            lse = jnp.where(some, peak * (1 / LOG2E) + jnp.log(jnp.where(some, total, 1.0)), MASKED)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[warpgroup] = (acc * stretched(inverse, acc.shape, 0)).astype(out_smem.dtype)
            lse_smem[warpgroup] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_ref.at[row, rows, head], commit_group=False)
            plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[row, head, rows], commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        def read(row, index):
            return *tile_of(tiles_ref, row, index), *part_of(tiles_ref, row, index, share.part(warpgroup))

        over_items(work, sm, read, item)

        @pl.when(warpgroup == 0)
        def last_turn():
            TURN.wait(0)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def one_warp(warp):
            @pl.when(warp == 0)
            def all_items():
                def item(entry, before):
                    item_head, row, tile, start, steps = entry

                    @pl.when(steps > 0)
                    def queries():
                        Q_DONE.wait()
                        for part in range(2):
                            mine = q_ref.at[share.block(row, tile, item_head, part)]
                            plgpu.copy_gmem_to_smem(mine, q_smem.at[pl.ds(part * PART, PART)], q_here)

                    kv_head = lax.div(item_head * share.heads, group)

                    def step(i, _):
                        slot = lax.rem(before + i, STAGES)
                        block = row, pl.ds(start + i * STEP_KV, STEP_KV), kv_head
                        K_DONE.wait(slot)
                        plgpu.copy_gmem_to_smem(k_ref.at[block], k_smem.at[slot], k_here.at[slot])
                        V_DONE.wait(slot)
                        plgpu.copy_gmem_to_smem(v_ref.at[block], v_smem.at[slot], v_here.at[slot])

                    lax.fori_loop(0, steps, step, None)

                over_items(work, sm, functools.partial(tile_of, tiles_ref), item)
