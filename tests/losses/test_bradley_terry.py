"""Pairs in packed rows, the loss by hand, and its calibration; TRL's gradients are in tests/steps/test_reward.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.bradley_terry import bradley_terry_loss, expected_calibration_error, mean_by_group
from dqjax.losses.pairs import count_pairs, pairs_of, weigh_pairs
from dqjax.losses.preference import preference_loss
from dqjax.types import Batch, Mean


def make_batch(pair_id, chosen) -> Batch:
    side = {"pair_id": np.array(pair_id, np.int32), "chosen": np.array(chosen, np.int32)}
    return Batch(*[np.zeros((len(pair_id), 1), np.int32)] * 6, side)


def test_by_hand():
    """Two pairs in one row, the second packed rejected first; a third sequence is in no pair."""
    batch = weigh_pairs(make_batch([[9, 9, -1, 4, 4]], [[1, 0, -1, 0, 1]]))
    pairs = pairs_of(jax.tree.map(jnp.asarray, batch))
    scores = jnp.array([[2.0, 0.5, 77.0, -1.0, -2.0]])
    margin = jnp.array([[0.25, 0, 0, 0, 0]])
    value, metrics = bradley_terry_loss(scores, pairs, margin=margin, centering=0.1)
    logistic = lambda x: np.log1p(np.exp(-x))  # noqa: E731
    want = (logistic(1.25) + 0.1 * 2.5**2 + logistic(-1.0) + 0.1 * 3.0**2) / 2
    np.testing.assert_allclose(value, want, rtol=1e-6)
    means = {name: float(m.total / m.count) for name, m in metrics.items() if m.total.ndim == 0}
    np.testing.assert_allclose(means["accuracy"], 0.5)
    np.testing.assert_allclose(means["margin"], 0.25)
    np.testing.assert_allclose(means["score"], -0.125)
    by_group = mean_by_group(jnp.ones((1, 5)), jnp.array([[2, 0, 1, 0, -1]]), 3, pairs)
    np.testing.assert_array_equal(by_group.count, [0, 0, 1])


def test_calibration():
    """Four pairs at p = 0.7, of which three are right: the gap of that bin is |0.75 − 0.7|."""
    batch = weigh_pairs(make_batch([[i, i] for i in range(4)], [[1, 0]] * 4))
    logit = float(np.log(0.7 / 0.3))
    scores = jnp.array([[logit, 0.0]] * 3 + [[0.0, logit]])
    _, metrics = bradley_terry_loss(scores, pairs_of(jax.tree.map(jnp.asarray, batch)))
    confidence, accuracy = metrics["calibration_confidence"], metrics["calibration_accuracy"]
    assert confidence.count.sum() == 4 and (confidence.count > 0).sum() == 1
    np.testing.assert_allclose(expected_calibration_error(confidence, accuracy), 0.05, rtol=1e-5)
    assert np.isnan(expected_calibration_error(Mean(np.zeros(2), np.zeros(2)), Mean(np.zeros(2), np.zeros(2))))


@pytest.mark.parametrize("size", [1e-3, 60.0, 1e4])
def test_far_scores_stay_finite(size):
    batch = weigh_pairs(make_batch([[1, 1]], [[1, 0]]))
    pairs = pairs_of(jax.tree.map(jnp.asarray, batch))
    for sign in (1, -1):
        value, gradient = jax.value_and_grad(lambda s: bradley_terry_loss(s, pairs)[0])(jnp.array([[sign * size, 0.0]]))
        assert np.isfinite(value) and np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient.sum(), 0, atol=1e-7)


def test_other_pairs_do_not_meet():
    """A NaN score reaches the loss, but no other pair's gradient."""
    batch = weigh_pairs(make_batch([[1, 1, 2, 2]], [[1, 0, 1, 0]]))
    pairs = pairs_of(jax.tree.map(jnp.asarray, batch))
    scores = jnp.array([[jnp.nan, 0.0, 1.0, 0.0]])
    value, gradient = jax.value_and_grad(lambda s: bradley_terry_loss(s, pairs)[0])(scores)
    assert np.isnan(value) and np.isnan(gradient[0, :2]).all() and np.isfinite(gradient[0, 2:]).all()


def test_weights_count_pairs_of_the_global_batch():
    batch = make_batch([[1, 1, -1], [2, 2, -1]], [[1, 0, -1], [1, 0, -1]])
    assert count_pairs(batch) == 2
    np.testing.assert_allclose(weigh_pairs(batch).side["weight"], [[0.5, 0.5, 0]] * 2)
    np.testing.assert_allclose(weigh_pairs(batch, total=8).side["weight"], [[0.125, 0.125, 0]] * 2)


@pytest.mark.parametrize(
    ("pair_id", "chosen"),
    [([[1, 1]], [[1, 1]]), ([[1, -1], [1, -1]], [[1, -1], [0, -1]]), ([[1, 1, 1]], [[1, 0, 0]])],
    ids=["two chosen", "split over rows", "three members"],
)
def test_broken_pairs_are_refused(pair_id, chosen):
    with pytest.raises(ValueError, match="expected one chosen .1. and one rejected .0. sequence in the row"):
        weigh_pairs(make_batch(pair_id, chosen))


def test_preference_by_hand():
    """Log-ratios of 0.3 and −0.1 nats, at one β and at a β of the pair's own."""
    batch = weigh_pairs(make_batch([[1, 1]], [[1, 0]]))
    pairs, ratio = pairs_of(jax.tree.map(jnp.asarray, batch)), jnp.array([[0.3, -0.1]])
    for beta in (2.0, jnp.array([[2.0, 77.0]])):
        value, metrics = preference_loss(ratio, pairs, beta)
        np.testing.assert_allclose(value, np.log1p(np.exp(-2 * 0.4)), rtol=1e-5)
        rewards = metrics["reward_chosen"].total, metrics["reward_rejected"].total, metrics["margin"].total
        np.testing.assert_allclose(rewards, [0.6, -0.2, 0.8], rtol=1e-5)
