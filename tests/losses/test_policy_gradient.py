"""Surrogates by hand, one token at a time; TRL's gradients are in tests/steps/test_grpo.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.policy_gradient import PolicyOptions, policy_gradient_loss
from dqjax.types import Batch


def one_sequence(n: int, advantage: float, weight: float = 1.0) -> Batch:
    """n trained tokens and one of padding."""
    row = np.arange(n + 1)
    real = (row < n).astype(np.int32)[None]
    weights = jnp.asarray(real * weight, jnp.float32)
    index = jnp.asarray(1 - real)
    side = {"advantage": jnp.array([[advantage]], jnp.float32)}
    return Batch(index, index, jnp.asarray(real), index, weights, index, side)


def evaluate(ratios, advantage, options, *, at=-1.0, sampled=None, reference=None, weight=1.0):
    """Value, d/d logprob and metrics for tokens whose ratios to the old policy are given."""
    pad = lambda x: jnp.append(jnp.asarray(x, jnp.float32), jnp.nan)[None]  # noqa: E731
    old = at - jnp.log(jnp.asarray(ratios))
    others = {} if sampled is None else {"sampled": pad(old - jnp.log(jnp.asarray(sampled)))}
    if reference is not None:
        others["reference"] = pad(jnp.full(len(ratios), reference))
    batch = one_sequence(len(ratios), advantage, weight)

    def loss(logprob):
        return policy_gradient_loss(logprob, jnp.ones_like(logprob), batch, options, old=pad(old), **others)

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(pad(np.full(len(ratios), at)))
    assert gradient[0, -1] == 0
    return float(value), np.asarray(gradient[0, :-1]), metrics


CLIP = PolicyOptions(clip_low=0.2, clip_high=0.3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # above 1 + ε with A > 0: clipped
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),  # below 1 − ε with A < 0: clipped
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clip(ratio, advantage, value, slope):
    got, gradient, metrics = evaluate([ratio], advantage, CLIP)
    np.testing.assert_allclose([got, *gradient], [value, slope], rtol=1e-5, atol=1e-6)
    assert float(metrics["clip_high"].total) == (ratio > 1.3 and advantage > 0)
    assert float(metrics["clip_low"].total) == (ratio < 0.8 and advantage < 0)


def test_two_sided_clip_bounds_a_bad_sample_that_became_likely():
    options = dataclasses.replace(CLIP, ratio_limit=2.0)
    np.testing.assert_allclose(evaluate([5.0], -1.0, options)[0], 2.0, rtol=1e-5)
    np.testing.assert_allclose(evaluate([5.0], -1.0, options)[1], 0)
    np.testing.assert_allclose(evaluate([5.0], -1.0, CLIP)[0], 5.0, rtol=1e-5)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    value, gradient, metrics = evaluate([4.0, 0.5], 1.0, PolicyOptions("cispo", ratio_cap=2.0))
    np.testing.assert_allclose(value, -(2.0 * -1.0) - (0.5 * -1.0), rtol=1e-5)
    np.testing.assert_allclose(gradient, [-2.0, -0.5], rtol=1e-5)
    assert metrics["clip_high"].total == 1


def test_sapo_is_the_policy_gradient_at_ratio_one():
    """d/dρ of (4/τ) σ(τ (ρ − 1)) at 1 is 1, whatever τ."""
    for advantage in (3.0, -3.0):
        np.testing.assert_allclose(evaluate([1.0], advantage, PolicyOptions("sapo"))[1], [-advantage], rtol=1e-5)


def test_sequence_ratio_is_the_geometric_mean():
    options = dataclasses.replace(CLIP, ratio="sequence")
    value, gradient, _ = evaluate([1.2, 1.0, 0.9], 1.0, options)
    mean = (1.2 * 1.0 * 0.9) ** (1 / 3)
    np.testing.assert_allclose(value, -3 * mean, rtol=1e-5)
    np.testing.assert_allclose(gradient, -mean * np.ones(3), rtol=1e-5)


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_on_policy_every_surrogate_is_the_policy_gradient(surrogate, ratio):
    """−A ∇ log π, which with leave-one-out advantages is RLOO's gradient; the reduction scales it."""
    _, gradient, metrics = evaluate([1.0, 1.0], 1.7, PolicyOptions(surrogate, ratio=ratio), weight=0.25)
    np.testing.assert_allclose(gradient, [-1.7 / 4, -1.7 / 4], rtol=1e-5)
    assert metrics["ratio"].value == metrics["inverse_ratio"].value == 1


def test_kl_is_k3():
    options = dataclasses.replace(CLIP, kl=0.5, kl_corrected=False)
    value, gradient, metrics = evaluate([1.0], 0.0, options, reference=-1.4)
    d = -0.4
    np.testing.assert_allclose(value, 0.5 * (np.exp(d) - d - 1), rtol=1e-5)
    np.testing.assert_allclose(gradient, [0.5 * (1 - np.exp(d))], rtol=1e-5)
    # With the ratio in front, the gradient is that of ρ · k3 at ρ = 1.
    _, corrected, _ = evaluate([1.0], 0.0, dataclasses.replace(options, kl_corrected=True), reference=-1.4)
    np.testing.assert_allclose(corrected, [0.5 * (np.exp(d) - d - 1 + 1 - np.exp(d))], rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"].total / metrics["kl"].count, np.exp(d) - d - 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ("none", [1, 1, 1]),
        ("token_truncate", [2.0, 0.5, 1.5]),
        ("token_mask", [0, 0, 1.5]),
        ("sequence_truncate", [1.5, 1.5, 1.5]),
        ("sequence_mask", [1.5, 1.5, 1.5]),
    ],
)
def test_sampler_correction(correction, weights):
    """The sampler was 4, 0.25 and 1.5 times less sure of the tokens than the old policy: 1.5 times of all three."""
    options = dataclasses.replace(CLIP, correction=correction, correction_low=0.5, correction_high=2.0)
    value, gradient, metrics = evaluate([1.0, 1.0, 1.0], 1.0, options, sampled=[4.0, 0.25, 1.5])
    np.testing.assert_allclose(value, -sum(weights), rtol=1e-5)
    np.testing.assert_allclose(gradient, -np.array(weights), rtol=1e-5)
    np.testing.assert_allclose(metrics["sampler_gap"].value, np.log(4), rtol=1e-5)


def test_sequence_mask_drops_a_whole_sample():
    options = dataclasses.replace(CLIP, correction="sequence_mask", correction_high=3.0)
    assert evaluate([1.0, 1.0], 1.0, options, sampled=[2.0, 2.0])[0] == 0


def test_extremes():
    _, _, metrics = evaluate([4.0, 0.125], 1.0, CLIP)
    np.testing.assert_allclose([metrics["ratio"].value, metrics["inverse_ratio"].value], [4, 8], rtol=1e-5)


def test_missing_log_probabilities_are_refused():
    with pytest.raises(ValueError, match="needs the sampler's"):
        evaluate([1.0], 1.0, dataclasses.replace(CLIP, correction="token_mask"))
    with pytest.raises(ValueError, match="needs a reference"):
        evaluate([1.0], 1.0, dataclasses.replace(CLIP, kl=0.1))
