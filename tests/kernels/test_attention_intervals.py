"""The plan of the Hopper kernels against the mask itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.kernels.attention.intervals import ALIGNED, OUT_OF_ORDER, PART, STEP_KV, STEP_Q, TILE, build_intervals, check_order
from dqjax.kernels.attention.mask import visible
from dqjax.kernels.attention.shapes import complete_tokens


def row(rng, length, documents, front, tail):
    """Segment ids of a row with padding at both ends."""
    real = length - front - tail
    cuts = np.sort(rng.choice(np.arange(1, real), documents - 1, replace=False)) if documents > 1 else []
    return np.r_[np.zeros(front), 1 + np.searchsorted(cuts, np.arange(real), side="right"), np.zeros(tail)]


def work_of(table, size, length):
    """[row, part of a tile, column of the other side] visited, visited without a mask, and fetched for the tile."""
    parts = (table.shape[2] - 3) // 4
    visited = np.zeros((len(table), parts * table.shape[1], length), int)
    unmasked, fetched = np.zeros_like(visited), np.zeros_like(visited)
    for b, entries in enumerate(np.asarray(table)):
        assert sorted(entries[:, 0]) == list(range(len(entries)))
        assert np.all(np.diff(entries[:, 2]) <= 0)
        for tile, start, steps, *bounds in entries:
            for part, (begin, lower_to, upper_from, end) in enumerate(np.reshape(bounds, (parts, 4)), parts * tile):
                assert 0 <= begin <= min(lower_to, upper_from) <= max(lower_to, upper_from) <= end <= steps
                for i in range(steps):
                    place = slice(start * ALIGNED + i * size, start * ALIGNED + (i + 1) * size)
                    assert place.stop <= length
                    fetched[b, part, place] += 1
                    visited[b, part, place] += begin <= i < end
                    unmasked[b, part, place] += lower_to <= i < upper_from
    return visited, unmasked, fetched


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
    tables = (
        (plan.q_tiles, STEP_KV, TILE, PART, see),
        (plan.q_parts, STEP_KV, PART, PART, see),
        (plan.kv_tiles, STEP_Q, TILE, PART, see.swapaxes(1, 2)),
    )
    for table, size, tile, part, mask in tables:
        visited, unmasked, fetched = work_of(table, size, whole)
        parts = mask.reshape(4, -1, part, whole)
        assert np.all(visited <= 1)
        assert np.all(visited[parts.any(axis=2)] == 1)
        assert np.all(parts.all(axis=2)[unmasked == 1])
        needed = parts.any(axis=2).sum(axis=2)
        assert np.all(visited.sum(axis=2) < needed + 2 * size)  # nothing but the rounding of both ends
        needed = mask.reshape(4, -1, tile, whole).any(axis=2).sum(axis=2)
        assert np.all(fetched[:, :: tile // part].sum(axis=2) < needed + size + 8)


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
