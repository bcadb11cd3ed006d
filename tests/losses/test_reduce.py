"""Weights of the reductions, and sums over sequences in packed rows."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.reduce import (
    Totals,
    mask_sequences,
    on_tokens,
    sequence_sums,
    totals_of,
    weigh_tokens,
)
from dqjax.types import Batch

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=30)


def make_batch(rows: list[list[tuple[int, int]]], width: int = 24, columns: int = 4) -> Batch:
    """Rows of (prompt, completion) lengths; completion tokens are trained, each at the place before it."""
    shape = (len(rows), width)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    index, weight = np.full(shape, columns, np.int32), np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        start = 0
        for s, (prompt, completion) in enumerate(row):
            here = slice(start, start + prompt + completion)
            segments[r, here], index[r, here] = s + 1, s
            positions[r, here] = np.arange(prompt + completion)
            weight[r, start + prompt - 1 : start + prompt + completion - 1] = 1
            start += prompt + completion
    return Batch(segments, segments, segments, positions, weight, index, {})


LENGTHS = st.lists(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), max_size=3), min_size=1, max_size=4)


@settings
@hypothesis.given(LENGTHS)
def test_weights_are_the_means_of_their_names(rows):
    """Against the definition, sequence by sequence."""
    batch = make_batch(rows)
    value = np.random.default_rng(0).normal(size=batch.tokens.shape)
    trained = batch.token_weight > 0
    places = [(r, trained[r] & (batch.sequence_index[r] == s)) for r, row in enumerate(rows) for s in range(len(row))]
    parts = [value[r][here] for r, here in places]
    tokens, sequences = sum(map(len, parts)), max(len(parts), 1)
    want = {
        "token_mean": sum(p.sum() for p in parts) / max(tokens, 1),
        "sequence_mean": sum(p.mean() for p in parts if len(p)) / sequences,
        "fixed_length": sum(p.sum() for p in parts) / (7 * sequences),
        "sum": sum(p.sum() for p in parts),
    }
    for reduction, expected in want.items():
        weighed = weigh_tokens(batch, reduction, length=7)
        np.testing.assert_allclose((weighed.token_weight * value).sum(), expected, rtol=1e-5, atol=1e-6)
        assert ((weighed.token_weight != 0) == (batch.token_weight != 0)).all()


@settings
@hypothesis.given(LENGTHS, LENGTHS)
def test_parts_of_a_batch_add_up(a, b):
    """Two hosts that exchange their totals weigh their halves as one host weighs the whole."""
    parts, whole = (make_batch(a), make_batch(b)), make_batch(a + b)
    totals = Totals(*map(sum, zip(*map(totals_of, parts))))
    assert totals == totals_of(whole)
    for reduction in ("token_mean", "sequence_mean"):
        halves = [weigh_tokens(p, reduction, totals=totals).token_weight for p in parts]
        np.testing.assert_array_equal(np.concatenate(halves), weigh_tokens(whole, reduction).token_weight)


def test_masked_sequences_stay_in_the_count():
    batch = make_batch([[(1, 2), (2, 4)]])
    masked = mask_sequences(batch, np.array([[False, True, False, False]]))
    assert masked.token_weight.sum() == 2
    np.testing.assert_allclose(weigh_tokens(masked, "sequence_mean").token_weight.sum(), 1 / 2)
    np.testing.assert_allclose(weigh_tokens(masked, "token_mean").token_weight.sum(), 1)
    whole = mask_sequences(batch, np.ones((1, 4), bool))
    assert not whole.token_weight.any() and not weigh_tokens(whole, "sequence_mean").token_weight.any()


def test_fixed_length_wants_a_length():
    with pytest.raises(ValueError, match="expected length >= 1, got None"):
        weigh_tokens(make_batch([[(1, 2)]]), "fixed_length")


@settings
@hypothesis.given(LENGTHS)
def test_sequence_sums(rows):
    batch = make_batch(rows)
    x = np.random.default_rng(1).normal(size=batch.tokens.shape).astype(np.float32)
    sums = sequence_sums(jnp.asarray(x), jnp.asarray(batch.sequence_index), 4)
    for s in range(4):
        np.testing.assert_allclose(sums[:, s], (x * (batch.sequence_index == s)).sum(1), rtol=1e-5, atol=1e-6)
    spread = on_tokens(sums, jnp.asarray(batch.sequence_index))
    assert (np.asarray(spread)[batch.segment_ids == 0] == 0).all()
    again = sequence_sums(spread, jnp.asarray(batch.sequence_index), 4)
    counts = np.stack([(batch.sequence_index == s).sum(1) for s in range(4)], 1)
    np.testing.assert_allclose(again, sums * counts, rtol=1e-4, atol=1e-5)


def test_padding_belongs_to_no_sequence():
    """A value in padding reaches no sum, even where the row has as many sequences as columns."""
    batch = make_batch([[(1, 2)] * 4])
    x = jnp.asarray(np.where(batch.segment_ids == 0, 1e9, 0), jnp.float32)
    assert not sequence_sums(x, jnp.asarray(batch.sequence_index), 4).any()
    assert totals_of(dataclasses.replace(batch, token_weight=batch.token_weight * 0)) == Totals(0, 4)
