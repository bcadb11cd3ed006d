"""The plan of the Hopper kernels against the mask itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.kernels.attention.intervals import ALIGNED, OUT_OF_ORDER, STEP_KV, STEP_Q, TILE, build_intervals, check_order
from dqjax.kernels.attention.mask import visible
from dqjax.kernels.attention.shapes import complete_tokens


def row(rng, length, documents, front, tail):
    """Segment ids of a row with padding at both ends."""
    real = length - front - tail
    cuts = np.sort(rng.choice(np.arange(1, real), documents - 1, replace=False)) if documents > 1 else []
    return np.r_[np.zeros(front), 1 + np.searchsorted(cuts, np.arange(real), side="right"), np.zeros(tail)]


def work_of(table, size, length):
    """[row, tile, column of the other side] visited, and visited without a mask."""
    visited = np.zeros((len(table), table.shape[1], length), int)
    unmasked = np.zeros_like(visited)
    for b, entries in enumerate(np.asarray(table)):
        assert sorted(entries[:, 0]) == list(range(len(entries)))
        assert np.all(np.diff(entries[:, 2]) <= 0)
        for tile, start, steps, lower_to, upper_from in entries:
            start *= ALIGNED
            assert 0 <= lower_to <= steps and 0 <= upper_from <= steps
            for i in range(steps):
                place = slice(start + i * size, start + (i + 1) * size)
                assert place.stop <= length
                visited[b, tile, place] += 1
                unmasked[b, tile, place] += lower_to <= i < upper_from
    return visited, unmasked


@pytest.mark.parametrize(
    ("length", "causal", "window"),
    [(640, True, None), (600, True, None), (512, False, None), (700, True, 50), (300, False, 33), (130, True, None)],
)
@pytest.mark.parametrize("shared", [True, False])
def test_tiles_cover_what_is_visible_once_and_unmasked_steps_see_everything(length, causal, window, shared):
    rng = np.random.default_rng(length)
    ids = np.stack([row(rng, length, n, f, t) for n, f, t in ((1, 0, 0), (5, 0, 40), (9, 3, 0), (2, 20, 30))])
    tokens = complete_tokens(4, length, length, jnp.asarray(ids, jnp.int32), None, None, None)
    plan = build_intervals(tokens, causal=causal, window=window, shared=shared)
    check_order(plan)
    see = np.asarray(visible(tokens, causal, window))
    at = np.arange(length)
    lower, upper = (np.asarray(x)[:, :length, None] for x in (plan.lower, plan.upper))
    np.testing.assert_array_equal((at >= lower) & (at < upper), see)

    whole = -(-length // TILE) * TILE
    see = np.pad(see, ((0, 0), (0, whole - length), (0, whole - length)))
    for table, size, mask in ((plan.q_tiles, STEP_KV, see), (plan.kv_tiles, STEP_Q, see.swapaxes(1, 2))):
        visited, unmasked = work_of(table, size, whole)
        tiles = mask.reshape(4, -1, TILE, whole)
        assert np.all(visited <= 1)
        assert np.all(visited[tiles.any(axis=2)] == 1)
        assert np.all(tiles.all(axis=2)[unmasked == 1])
        needed = tiles.any(axis=2).sum(axis=2)
        assert np.all(visited.sum(axis=2) < needed + size + 8)  # nothing but the rounding of both ends


def test_a_prompt_in_the_cache():
    """Queries at positions 5, 6, 7 of a row with 8 keys in 16 slots, after one padding query."""
    tokens = complete_tokens(
        1, 4, 16, jnp.array([[0, 1, 1, 1]]), jnp.array([[1] * 8 + [0] * 8]), jnp.array([[0, 5, 6, 7]]), None
    )
    plan = build_intervals(tokens, causal=True, window=None, shared=False)
    assert np.asarray(plan.lower)[0, :4].tolist() == [0, 0, 0, 0]
    assert np.asarray(plan.upper)[0, :4].tolist() == [0, 6, 7, 8]


@pytest.mark.parametrize("ids", [[1, 2, 1, 0], [2, 1, 0, 0], [1, 0, 2, 2]])
@pytest.mark.parametrize("shared", [True, False])
def test_rows_out_of_order_are_marked_and_refused(ids, shared):
    tokens = complete_tokens(2, 4, 4, jnp.array([[1, 1, 2, 0], ids]), None, None, None)
    plan = build_intervals(tokens, causal=True, window=None, shared=shared)
    assert np.all(np.asarray(plan.lower)[1] == OUT_OF_ORDER) and not np.any(np.asarray(plan.lower)[0] == OUT_OF_ORDER)
    with pytest.raises(ValueError, match=r"rows \[1\].*'xla'"):
        check_order(plan)
