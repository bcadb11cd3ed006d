import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.rollout.sampling import Sampling, filter_logits, sample

LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01], np.float32))


def kept(**options):
    return set(
        np.flatnonzero(np.isfinite(np.asarray(filter_logits(jnp.asarray(LOGITS)[None], Sampling(**options)))[0]))
    )


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


@pytest.mark.parametrize("vocab", [50, 1000])  # less than a block, and more blocks than k
def test_filters_agree_with_transformers(vocab):
    """The same tokens survive as in transformers' own warpers, over random logits."""
    torch = pytest.importorskip("torch")
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(64, vocab)).astype(np.float32) * 3
    for options, warpers in [
        ({"top_k": 5}, [TopKLogitsWarper(5)]),
        ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"top_p": 0.999}, [TopPLogitsWarper(0.999)]),
        ({"top_k": 5, "top_p": 0.7}, [TopKLogitsWarper(5), TopPLogitsWarper(0.7)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    ]:
        ours = np.isfinite(np.asarray(filter_logits(jnp.asarray(logits), Sampling(**options))))
        theirs = torch.tensor(logits)
        for warper in warpers:
            theirs = warper(None, theirs)
        np.testing.assert_array_equal(ours, np.isfinite(theirs.numpy()))


def test_ties_at_a_cut_are_all_kept():
    logits = jnp.log(jnp.array([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    for options in ({"top_k": 2}, {"top_p": 0.4}, {"top_k": 3, "top_p": 0.5}):
        assert np.isfinite(filter_logits(logits, Sampling(**options))).tolist() == [[True] * 4 + [False]]


def chi_square(counts, expected):
    """(the statistic, its 99.9% quantile by Wilson and Hilferty's cube) of draws against probabilities."""
    support, n = expected > 0, counts.sum()
    assert counts[~support].sum() == 0
    statistic = ((counts[support] - n * expected[support]) ** 2 / (n * expected[support])).sum()
    freedom = max(int(support.sum()) - 1, 1)
    return statistic, freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.8}, {"min_p": 0.02}])
def test_samples_over_several_blocks_are_distributed_right(options):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=300).astype(np.float32))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(40_000))
    expected = np.asarray(jax.nn.softmax(filter_logits(logits[None], Sampling(**options))[0]))
    draws = jax.jit(
        lambda keys: sample(
            jnp.broadcast_to(logits, (5_000, 300)), keys, jnp.zeros(5_000, jnp.int32), Sampling(**options)
        )[0]
    )
    tokens = np.concatenate([draws(part) for part in keys.reshape(8, -1)])
    statistic, critical = chi_square(np.bincount(tokens, minlength=300), expected)
    assert statistic <= critical


def test_entries_without_weight_are_never_drawn():
    """Not by rounding either: padding, −inf, and weights that vanish beside others."""
    logits = jnp.full((2_000, 300), -jnp.inf).at[:, 131].set(0.0).at[:, 299].set(-200.0)
    tokens, _ = sample(logits, jax.random.split(jax.random.key(0), 2_000), jnp.zeros(2_000, jnp.int32), Sampling())
    assert set(np.asarray(tokens).tolist()) == {131}


def test_a_forced_token_has_the_log_probability_that_the_policy_gives_it():
    logits, keys = jnp.asarray(LOGITS)[None].repeat(3, 0), jax.random.split(jax.random.key(0), 3)
    forced, free = jnp.array([6, -1, 2]), sample(logits, keys, jnp.zeros(3, jnp.int32), Sampling(top_k=1))[0]
    tokens, logprobs = sample(logits, keys, jnp.zeros(3, jnp.int32), Sampling(top_k=1), forced)
    assert tokens.tolist() == [6, free[1], 2]
    np.testing.assert_allclose(logprobs, LOGITS[np.asarray(tokens)], atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}]
)
def test_samples_are_distributed_right(options):
    """Chi-square of 20,000 draws against the filtered distribution, at the 0.1% level."""
    sampling, n = Sampling(**options), 20_000
    expected = np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(LOGITS)[None], sampling)[0]))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(7), i))(jnp.arange(n))
    tokens, _ = sample(jnp.broadcast_to(jnp.asarray(LOGITS), (n, 7)), keys, jnp.zeros(n, jnp.int32), sampling)
    statistic, critical = chi_square(np.bincount(np.asarray(tokens), minlength=7), expected)
    assert statistic <= critical


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
