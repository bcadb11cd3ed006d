"""Ordinal heads: soft labels, the loss, missing labels, and kappa by hand."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.ordinal import (
    count_labels,
    expected_level,
    ordinal_loss,
    quadratic_weighted_kappa,
    soft_labels,
    weigh_labels,
)
from dqjax.types import Batch

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=40)


def test_soft_labels():
    np.testing.assert_allclose(soft_labels(jnp.array([2.0, 2.25]), 4, 0.0), [[0, 0, 1, 0], [0, 0, 0.75, 0.25]])
    near = np.exp(-1 / (2 * 0.5**2))
    want = np.array([near, 1, near, near**4])
    np.testing.assert_allclose(soft_labels(jnp.array(1.0), 4, 0.5), want / want.sum(), rtol=1e-5)


@settings
@hypothesis.given(st.floats(0, 9), st.floats(0, 3))
def test_soft_labels_are_distributions_with_their_mode_at_the_label(label, smoothing):
    hypothesis.assume(smoothing == 0 or smoothing > 0.05)
    q = np.asarray(soft_labels(jnp.float32(label), 10, smoothing))
    np.testing.assert_allclose(q.sum(), 1, rtol=1e-5)
    assert abs(q.argmax() - label) <= 0.5 + 1e-5


def test_loss_by_hand():
    """Two labelled sequences of three; the third's NaN touches nothing."""
    logits = jnp.array([[[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [jnp.nan] * 3]])
    labels, weight = jnp.array([[2.0, 1.0, jnp.nan]]), jnp.array([[0.5, 0.5, 0.0]])
    logp = jax.nn.log_softmax(logits)
    run = lambda x: ordinal_loss(x, labels, weight, smoothing=0.0)  # noqa: E731
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(logits)
    np.testing.assert_allclose(value, -(logp[0, 0, 2] + logp[0, 1, 1]) / 2, rtol=1e-6)
    assert np.isfinite(gradient).all() and not gradient[0, 2].any()
    levels = expected_level(logits)[0, :2]
    error = metrics["absolute_error"]
    np.testing.assert_allclose(error.total / error.count, np.abs(levels - np.array([2.0, 1.0])).mean(), rtol=1e-5)
    want = np.zeros((3, 3))
    for label, level in zip((2, 1), levels):
        want[label, round(float(level))] += 1
    np.testing.assert_array_equal(metrics["confusion"].total, want)
    np.testing.assert_allclose((metrics["confusion"].total / metrics["confusion"].count).sum(), 1)


def make_batch(labels) -> Batch:
    """Two sequences in a row with room for three."""
    index = np.array([[0, 0, 1, 3]], np.int32)
    segments = np.array([[1, 1, 2, 0]], np.int32)
    return Batch(index, index, segments, index, index.astype(np.float32), index, {"level": np.array([labels])})


@pytest.mark.parametrize("missing", [np.float32(np.nan), np.float32(-1), np.int32(-1)])
def test_missing_labels_weigh_nothing(missing):
    """The third column holds no sequence: its 0, the packer's filling, is no label."""
    batch = make_batch(np.array([4, missing, 0], missing.dtype))
    assert count_labels(batch, ["level"], classes=10) == {"level": 1}
    np.testing.assert_array_equal(weigh_labels(batch, ["level"], classes=10).side["level_weight"], [[1, 0, 0]])
    shared = weigh_labels(batch, ["level"], classes=10, totals={"level": 4})
    np.testing.assert_array_equal(shared.side["level_weight"], [[0.25, 0, 0]])


def test_labels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="label 'level': expected 0 to 9, got 10"):
        weigh_labels(make_batch(np.array([4.0, 10.0, 0])), ["level"], classes=10)


def test_kappa():
    """The textbook cases, and one by hand: O = [[1, 1], [0, 2]] / 4 has κ = 1 − (1/4) / (1/2)."""
    assert quadratic_weighted_kappa(np.diag([3.0, 2, 5])) == 1
    assert quadratic_weighted_kappa(np.outer([1.0, 2, 3], [2.0, 2, 2])) == pytest.approx(0)
    assert quadratic_weighted_kappa(np.array([[0.0, 1], [1, 0]])) == pytest.approx(-1)
    assert quadratic_weighted_kappa(np.array([[1.0, 1], [0, 2]])) == pytest.approx(0.5)
    assert np.isnan(quadratic_weighted_kappa(np.zeros((3, 3))))
    assert np.isnan(quadratic_weighted_kappa(np.diag([3.0, 0])))


@settings
@hypothesis.given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_kappa_is_one_minus_the_ratio_of_squared_errors(pairs):
    """Σ w O / Σ w E = E(a − b)² / (var a + var b + (mean a − mean b)²)."""
    a, b = np.array(pairs, np.float64).T
    chance = a.var() + b.var() + (a.mean() - b.mean()) ** 2
    hypothesis.assume(chance > 1e-9)
    confusion = np.zeros((5, 5))
    np.add.at(confusion, (a.astype(int), b.astype(int)), 1)
    np.testing.assert_allclose(quadratic_weighted_kappa(confusion), 1 - ((a - b) ** 2).mean() / chance, atol=1e-9)
