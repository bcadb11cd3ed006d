import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.rollout.sampling import Sampling, filter_logits, sample

LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01], np.float32))


def kept(**options):
    return set(np.flatnonzero(np.isfinite(np.asarray(filter_logits(jnp.asarray(LOGITS)[None], Sampling(**options)))[0])))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, range(7)),
        ({"top_k": 3}, range(3)),
        ({"top_k": 99}, range(7)),
        ({"top_p": 0.39}, range(1)),  # the first alone reaches it
        ({"top_p": 0.41}, range(2)),
        ({"top_p": 0.65}, range(2)),
        ({"top_p": 1e-6}, range(1)),  # the likeliest always stays
        ({"min_p": 0.2}, range(4)),  # at least 0.08
        ({"min_p": 1.0}, range(1)),
        ({"top_k": 4, "top_p": 0.8}, range(3)),  # 0.4/0.9 + 0.25/0.9 = 0.72 < 0.8
    ],
)
def test_filters(options, expected):
    assert kept(**options) == set(expected)


def test_filters_agree_with_transformers():
    """The same tokens survive as in transformers' own warpers, over random logits."""
    torch = pytest.importorskip("torch")
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(64, 50)).astype(np.float32) * 3
    for option, warper in [
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ]:
        ours = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), Sampling(**option))))
        theirs = np.isfinite(warper(None, torch.tensor(logits)).numpy())
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}]
)
def test_samples_are_distributed_right(options):
    """Chi-square of 20,000 draws against the filtered distribution, at the 0.1% level."""
    sampling, n = Sampling(**options), 20_000
    expected = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(LOGITS)[None], sampling)[0]))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(n))
    tokens, _ = sample(jnp.broadcast_to(jnp.asarray(LOGITS), (n, 7)), keys, jnp.zeros(n, jnp.int32), sampling)
    counts = np.bincount(np.asarray(tokens), minlength=7)
    support = expected > 0
    assert counts[~support].sum() == 0
    chi2 = ((counts[support] - n * expected[support]) ** 2 / (n * expected[support])).sum()
    critical = {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}[int(support.sum()) - 1]
    assert chi2 <= critical


def test_logprobs_are_of_the_full_distribution_at_the_temperature():
    logits = jnp.asarray(LOGITS)[None] * 2
    keys = jax.random.split(jax.random.key(0), 1)
    token, logprob = sample(logits, keys, jnp.zeros(1, jnp.int32), Sampling(temperature=0.7, top_k=1))
    np.testing.assert_allclose(logprob[0], jax.nn.log_softmax(logits[0] / 0.7)[int(token[0])], rtol=1e-6)
    token, logprob = sample(logits, keys, jnp.zeros(1, jnp.int32), Sampling(temperature=0))
    assert int(token[0]) == 0
    np.testing.assert_allclose(logprob[0], jax.nn.log_softmax(logits[0])[0], rtol=1e-6)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}])
def test_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)
