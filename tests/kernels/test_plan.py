"""The plan against the mask itself: nothing visible is skipped, nothing masked is run bare, every output is written."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.kernels.attention.api import make_plan
from dqjax.kernels.attention.mask import Tokens, visible
from dqjax.kernels.attention.plan import MOST_BLOCKS, Step, pack_step, unpack_step

T, BLOCKS = 96, (16, 24)


def by_blocks(see):
    """The mask cut into blocks [I, J, block_q, block_kv]."""
    q, kv = BLOCKS
    return see.reshape(T // q, q, T // kv, kv).transpose(0, 2, 1, 3)


def steps_of(plan, b, order):
    words = np.asarray(plan.q_major if order == 0 else plan.kv_major)[b]
    return unpack_step(words[: int(plan.steps[b, order])]), unpack_step(words[int(plan.steps[b, order]) :])


plan_of = jax.jit(
    lambda segments, positions, causal, window: make_plan(
        segments, q_positions=positions, kv_positions=positions, causal=causal, window=window, blocks=BLOCKS
    ),
    static_argnums=(2, 3),
)


@hypothesis.settings(max_examples=60, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    documents=st.integers(0, T),
    ordered=st.booleans(),
    restart=st.booleans(),
    options=st.sampled_from([(True, None), (True, 20), (False, None), (False, 9)]),
)
def test_plan_covers_the_mask(seed, documents, ordered, restart, options):
    rng = np.random.default_rng(seed)
    segments = rng.integers(0, documents + 1, (2, T))
    if ordered:  # rising ids, padding last
        segments = np.sort(np.where(segments == 0, documents + 1, segments))
        segments = np.where(segments == documents + 1, 0, segments)
    segments = segments.astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32) % (17 if restart else T), (2, T))
    plan = plan_of(jnp.asarray(segments), jnp.asarray(positions), *options)
    see = np.asarray(visible(Tokens(*map(jnp.asarray, (segments, segments, positions, positions))), *options))
    for b in range(2):
        blocks = by_blocks(see[b])
        needed, whole = blocks.any((2, 3)), blocks.all((2, 3))
        for order in (0, 1):
            steps, rest = steps_of(plan, b, order)
            run = np.zeros_like(needed)
            run[steps.i[steps.compute == 1], steps.j[steps.compute == 1]] = True
            assert not (needed & ~run).any()
            bare = steps.whole == 1
            assert whole[steps.i[bare], steps.j[bare]].all()
            slow, size = (steps.i, plan.blocks_q) if order == 0 else (steps.j, plan.blocks_kv)
            assert (np.diff(slow) >= 0).all()
            np.testing.assert_array_equal(slow[steps.first == 1], np.arange(size))
            np.testing.assert_array_equal(slow[steps.last == 1], np.arange(size))
            assert not (rest.first | rest.last | rest.compute | rest.whole).any()
        j = np.arange(plan.blocks_kv)
        inside = (j >= np.asarray(plan.kv_start)[b][:, None]) & (j < np.asarray(plan.kv_end)[b][:, None])
        assert not (needed & ~inside).any()


def test_packed_documents_are_skipped():
    """64 blocks in 8 documents of 8 blocks: 8 triangles of 36 pairs, of which 28 need no mask."""
    segments = jnp.asarray(np.repeat(np.arange(1, 9, dtype=np.int32), 128)[None])
    plan = jax.jit(functools.partial(make_plan, blocks=(16, 16)))(segments)
    for order in (0, 1):
        steps, _ = steps_of(plan, 0, order)
        assert len(steps.i) == 8 * 36 and steps.compute.all() and steps.whole.sum() == 8 * 28
    assert plan.q_major.shape[1] == 64 * 65 // 2


def test_steps_fit_in_a_word():
    top = MOST_BLOCKS - 1
    for i, j in ((0, 0), (top, 0), (0, top), (top, top), (5, 9)):
        for flags in np.ndindex(2, 2, 2, 2):
            step = Step(*map(jnp.int32, (i, j, *flags)))
            assert tuple(map(int, unpack_step(pack_step(step)))) == (i, j, *flags)


def test_too_many_blocks_are_refused():
    with pytest.raises(ValueError, match="larger blocks"):
        make_plan(jnp.ones((1, 2 * MOST_BLOCKS), jnp.int32), blocks=(1, 128))
