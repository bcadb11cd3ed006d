"""Decode attention on Hopper GPUs (sm90), in Pallas's Mosaic GPU dialect.

The cache is read once, as fast as memory gives it, and the arithmetic hides behind. An item of work is a part of the
keys of a sequence's key-value head; items are dealt to two workers a multiprocessor in turn, the longest first and every
other turn backwards, so that everyone's share weighs the same. A worker is a warpgroup, which multiplies the head's group
of queries, in the first of the 64 rows of a tensor-core product, and a warp, which fetches keys and values ahead of it:
up to the sequence's length and no further, and on into the next item while the warpgroup ends this one. The parts are
put together by their lse. Of a cache of pages the warp that fetches reads the table, a tile ahead.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.mask import MASKED, Variant
from dqjax.kernels.attention.mosaic_gpu import bent_products
from dqjax.kernels.hopper import BY_ROW, LOG2E, PARAMS, SMS, TRANSFORMS, WGMMA, Handover, stretched, too_old
from dqjax.kernels.tuning.lookup import Problem, chosen
from dqjax.kernels.varying import typed_shape, varying_axes

ROWS = 64
"""Of a product; those of the group are in use."""

TILE, STAGES = 64 * 128, 3
"""Numbers of keys, and of values, fetched at once; how many such tiles of each a worker has on their way or in use."""

WORKERS = 2 * SMS

PARTS = (2048, 1024, 512, 256)
"""Slots of a part: by rule the most that leaves some parts for every multiprocessor."""

LINES = 8
"""Slots are copied in whole multiples of this."""

DONE = Handover(4, 128 + 32)
"""One a tile of both workers: its warpgroup has read it, for its warp to fill again."""


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
    k_cache: Float[Array, "P S K H"],
    v_cache: Float[Array, "P S K H"],
    lengths: Int[Array, "B"],
    variant: Variant,
    pages: Int[Array, "B n"] | None = None,
) -> Float[Array, "B N H"]:
    """As the reference, with the weights rounded to the cache's dtype; slots past `lengths` must be finite.

    A page is a whole number of tiles; all numbers in `pages` are pages.
    """
    (B, N, H), (S, K) = q.shape, k_cache.shape[1:3]
    step = TILE // H
    refusal = why_not_mosaic_gpu(q.dtype, H, S)
    if refusal is None and N // K > ROWS:
        refusal = f"more than {ROWS} queries a key-value head"
    if refusal is None and pages is not None and S % step:
        refusal = f"pages whose slots are no multiple of {step}"
    if refusal:
        raise NotImplementedError(f"decode_attention: backend 'mosaic_gpu' cannot do {refusal}; use 'xla'")
    group = N // K
    tables = () if pages is None else (pages.reshape(-1),)
    page, S = S, S if pages is None else S * pages.shape[1]
    rule = next((part for part in PARTS if B * K * -(-S // part) >= 4 * SMS), PARTS[-1])
    part = chosen(Problem("decode_attention", "mosaic_gpu", k_cache.dtype.name, H, group, B * K, S), PARTS, rule)
    parts = -(-S // part)
    upper = lengths.astype(jnp.int32)
    lower = jnp.zeros_like(upper) if variant.window is None else jnp.maximum(upper - variant.window, 0)
    starts = jnp.arange(parts, dtype=jnp.int32) * part
    keys = jnp.minimum(starts + part, upper[:, None]) - jnp.maximum(starts, lower[:, None])
    order = jnp.argsort(-jnp.maximum(keys, 0).reshape(-1))
    sequence = order // parts
    axes = varying_axes((q, k_cache, v_cache, lengths, tables))
    outputs = [typed_shape((B, parts, K, group, H), q.dtype if parts == 1 else jnp.float32, axes)]
    if parts > 1:
        outputs.append(typed_shape((B, parts, K, group), jnp.float32, axes))
    out, *lse = plgpu.kernel(
        functools.partial(
            _kernel, variant=variant, part_size=part, work=Work(K, B, parts), page_size=page if tables else None
        ),
        out_type=tuple(outputs),
        scratch_types=dict(
            k_smem=plgpu.SMEM((2, STAGES, step, H), q.dtype, transforms=TRANSFORMS),
            v_smem=plgpu.SMEM((2, STAGES, step, H), q.dtype, transforms=TRANSFORMS),
            k_here=plgpu.Barrier(num_barriers=2 * STAGES),
            v_here=plgpu.Barrier(num_barriers=2 * STAGES),
        ),
        grid=(SMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=PARAMS,
        kernel_name="decode_attention",
    )(q.reshape(B, K, group, H), k_cache, v_cache, order, lower[sequence], upper[sequence], *tables)
    return (out if parts == 1 else _joined(out, *lse)).reshape(B, N, H).astype(q.dtype)


def _joined(out: Float[Array, "B P K G H"], lse: Float[Array, "B P K G"]) -> Float[Array, "B K G H"]:
    """The parts weighed by what each holds of the sum of exponentials; 0 where none holds any."""
    weights = jnp.where(lse > MASKED, jnp.exp(lse - jnp.max(lse, axis=1, keepdims=True)), 0)
    total = jnp.sum(weights, axis=1)
    return jnp.einsum("BPKG,BPKGH->BKGH", weights, out) / jnp.where(total > 0, total, 1)[..., None]


class Work(NamedTuple):
    """The items: heads side by side, which share lines of memory, of parts of sequences in the order of a table."""

    heads: int
    rows: int
    parts: int

    def share(self, worker):
        """How many of them fall to a worker."""
        turns, rest = divmod(self.heads * self.rows * self.parts, WORKERS)
        return turns + (self._place(worker, turns) < rest).astype(jnp.int32)

    def item(self, worker, turn, order_ref, lower_ref, upper_ref):
        """sequence, part, head, and the sequence's bounds; those of the last item past the end.

        Args:
          order_ref: sequence · parts + part of each entry; lower_ref, upper_ref: the bounds of its sequence.
        """
        n = jnp.minimum(turn * WORKERS + self._place(worker, turn), self.heads * self.rows * self.parts - 1)
        entry, head = n // self.heads, lax.rem(n, self.heads)
        row = order_ref[entry]
        return row // self.parts, lax.rem(row, self.parts), head, lower_ref[entry], upper_ref[entry]

    @staticmethod
    def _place(worker, turn):
        return jnp.where(turn % 2 == 0, worker, WORKERS - 1 - worker)


def _over_items(work: Work, worker, table, part_size, step_size, body):
    """Runs `body(sequence, part, head, lower, upper, first step, steps, steps before it)`, reading one entry ahead."""

    def one(turn, carry):
        before, (sequence, part, head, lower, upper) = carry
        upcoming = work.item(worker, turn + 1, *table)
        first = lax.div(lax.max(part * part_size, lower), step_size)
        last = lax.div(lax.min((part + 1) * part_size, upper) + step_size - 1, step_size)
        steps = lax.max(last - first, 0)
        body(sequence, part, head, lower, upper, first, steps, before)
        return before + steps, upcoming

    lax.fori_loop(0, work.share(worker), one, (jnp.int32(0), work.item(worker, jnp.int32(0), *table)))


def _kernel(
    q_ref, k_ref, v_ref, order_ref, lower_ref, upper_ref, *refs,
    k_smem, v_smem, k_here, v_here, variant, part_size, work, page_size,
):  # fmt: skip
    page_refs, (out_ref, *lse_refs) = (refs[:0], refs) if page_size is None else (refs[:1], refs[1:])
    sm, warpgroup = lax.axis_index("sm"), lax.axis_index("warpgroup")
    step_size, H = k_smem.shape[2:]
    over_items = functools.partial(
        _over_items, work, table=(order_ref, lower_ref, upper_ref), part_size=part_size, step_size=step_size
    )

    @pl.when(warpgroup < 2)
    def compute():
        plgpu.set_max_registers(240, action="increase")
        k_mine, v_mine = k_smem.at[warpgroup], v_smem.at[warpgroup]
        for slot in range(STAGES):
            DONE.arrive(warpgroup * STAGES + slot)

        def item(sequence, part, head, lower, upper, first, steps, before):
            q = _load_rows(q_ref.at[sequence, head])
            peak = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), BY_ROW)
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), BY_ROW)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), WGMMA)

            def step(i, carry):
                acc, peak, total = carry
                slot = lax.rem(before + i, STAGES)
                barrier = warpgroup * STAGES + slot
                plgpu.barrier_wait(k_here.at[barrier])

                def multiply_keys(products):
                    plgpu.wgmma(products, q, k_mine.at[slot].T)
                    return products[...]

                products = pl.run_scoped(multiply_keys, plgpu.ACC((ROWS, step_size), jnp.float32))
                x, factor, _ = bent_products(products, variant)
                column = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=WGMMA) + (first + i) * step_size
                x = jnp.where((column >= lower) & (column < upper), x, -jnp.inf)
                new_peak = jnp.maximum(peak, x.max(axis=1) * factor)
                shrink = jnp.exp2(peak - new_peak)
                weights = jnp.exp2(x * factor - stretched(new_peak, x.shape, 0))
                acc *= stretched(shrink, acc.shape, 0)
                total = total * shrink + weights.sum(axis=1)
                weights = weights.astype(k_smem.dtype)
                plgpu.barrier_wait(v_here.at[barrier])

                def multiply_values(acc):
                    plgpu.wgmma(acc, weights, v_mine.at[slot])

                acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
                DONE.arrive(barrier)
                return acc, new_peak, total

            acc, peak, total = lax.fori_loop(0, steps, step, (acc, peak, total))
            some = total > 0
            total = jnp.where(some, total, 1.0)
            _store_rows(acc * stretched(1 / total, acc.shape, 0), out_ref.at[sequence, part, head])
            for lse_ref in lse_refs:
                lse = jnp.where(some, peak * (1 / LOG2E) + jnp.log(total), MASKED)
                _store_rows(lse, lse_ref.at[sequence, part, head])

        over_items(2 * sm + warpgroup, body=item)

    @pl.when(warpgroup == 2)
    def fetch():
        plgpu.set_max_registers(24, action="decrease")
        quarter = step_size // 4
        width = None if page_size is None else page_refs[0].shape[0] // q_ref.shape[0]

        @plgpu.warp_map
        def of_a_worker(warp):
            @pl.when(warp < 2)
            def all_items():
                def item(sequence, part, head, lower, upper, first, steps, before):
                    def row_of(i):
                        """Where the i-th tile lies: the sequence's row, or a page of it."""
                        if page_size is None:
                            return sequence
                        place = lax.div((first + lax.min(i, lax.max(steps - 1, 0))) * step_size, page_size)
                        return page_refs[0][sequence * width + place]

                    def step(i, row):
                        upcoming = row_of(i + 1)
                        slot = lax.rem(before + i, STAGES)
                        barrier = warp * STAGES + slot
                        start = (first + i) * step_size
                        here = start if page_size is None else lax.rem(start, page_size)
                        # All of a tile where nothing lies yet: what is not fetched must be finite.
                        needed = jnp.where(before + i < STAGES, step_size, upper - start)
                        DONE.wait(barrier)
                        needed = lax.min(needed, step_size)
                        for rows in range(quarter, step_size + 1, quarter):

                            @pl.when((needed > rows - quarter) & (needed <= rows))
                            def copy():
                                block, place = (row, pl.ds(here, rows), head), (warp, slot, pl.ds(0, rows))
                                for ref, smem, full in ((k_ref, k_smem, k_here), (v_ref, v_smem, v_here)):
                                    plgpu.copy_gmem_to_smem(ref.at[block], smem.at[place], full.at[barrier])

                        return upcoming

                    lax.fori_loop(0, steps, step, row_of(jnp.int32(0)))

                over_items(2 * sm + warp, body=item)


def _load_rows(ref) -> Float[Array, "64 H"]:
    """The group's queries from global memory, the last one again in the rows behind them."""
    group, H = ref.shape

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((ROWS, H), ref.dtype, layout=WGMMA)
    )
    def load(_, ref):
        layout = mgpu.WGMMA_LAYOUT
        vector_type = layout.registers_element_type(ir.MemRefType(ref.type).element_type)
        last = arith.constant(ir.IndexType.get(), group - 1)
        registers = np.empty(layout.registers_shape((ROWS, H)), object)
        for place, (row, column) in zip(np.ndindex(registers.shape), layout.thread_idxs((ROWS, H))):
            registers[place] = vector.load(vector_type, ref, [arith.minui(row, last), column])
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(ref)


def _store_rows(x: Float[Array, "64 ..."], ref) -> None:
    """Writes the group's rows to global memory, in its dtype."""
    group = ref.shape[0]

    @plgpu.inline_mgpu(arg_types=(WGMMA if x.ndim == 2 else BY_ROW, plgpu.RefType()))
    def store(_, x, ref):
        end = arith.constant(ir.IndexType.get(), group)
        for register, (row, *column) in zip(x.registers.flat, x.layout.thread_idxs(x.shape), strict=True):
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.ult, row, end)):
                vector.store(register, ref, [row, *column])

    store(x.astype(ref.dtype), ref)
