"""Advantages of groups: hand arithmetic, TRL's estimators, and what must hold for any rewards."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra.numpy import array_shapes, arrays

from dqjax.losses.advantages import group_advantages, uninformative_groups

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
REWARDS = arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(-3, 3))


def test_by_hand():
    """r = 1 0 0 1: mean 1/2, std (ddof 1) √(1/3)."""
    a = 0.5 / (np.sqrt(1 / 3) + 1e-4)
    np.testing.assert_allclose(group_advantages(np.array([[1.0, 0, 0, 1]])), [[a, -a, -a, a]], rtol=1e-6)
    plain = group_advantages(np.array([[1.0, 0, 0, 1]]), scale="none")
    np.testing.assert_allclose(plain, [[0.5, -0.5, -0.5, 0.5]])
    rloo = group_advantages(np.array([[1.0, 0, 0, 1]]), scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(rloo, [[2 / 3, -2 / 3, -2 / 3, 2 / 3]], rtol=1e-6)
    batch = group_advantages(np.array([[1.0, 0], [5, 5]]), scale="batch")
    np.testing.assert_allclose(batch[0, 0], 0.5 / (np.std([1, 0, 5, 5], ddof=1) + 1e-4), rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_trl(scale):
    """As `GRPOTrainer` computes them, with an ungraded sample, by its own NaN-aware std."""
    import torch
    from trl.trainer.utils import nanstd

    rewards = np.random.default_rng(0).normal(size=(4, 5))
    rewards[1, 2] = np.nan
    r = torch.tensor(rewards)
    std = {"group": nanstd(r, dim=1)[:, None], "batch": nanstd(r.view(-1)), "none": None}[scale]
    want = r - torch.nanmean(r, dim=1, keepdim=True)
    want = want if std is None else want / (std + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, scale=scale), torch.nan_to_num(want), rtol=1e-5, atol=1e-6)


@settings
@hypothesis.given(REWARDS, st.sampled_from(["group", "batch", "none"]), st.sampled_from(["mean", "leave_one_out"]))
def test_sums_to_zero_and_keeps_the_order(rewards, scale, baseline):
    advantages = group_advantages(rewards, scale=scale, baseline=baseline)
    assert np.isfinite(advantages).all()
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-4 * (1 + np.abs(advantages).max()))
    order = np.argsort(rewards, axis=1, kind="stable")
    assert (np.diff(np.take_along_axis(advantages, order, axis=1), axis=1) >= 0).all()


@settings
@hypothesis.given(REWARDS.filter(lambda r: r.shape[1] > 1))
def test_leave_one_out_is_the_mean_of_the_others(rewards):
    others = np.stack([np.delete(rewards, i, axis=1).mean(1) for i in range(rewards.shape[1])], axis=1)
    ours = group_advantages(rewards, scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(ours, rewards - others, rtol=1e-5, atol=1e-5)


def test_ungraded_samples():
    """They move neither the baseline nor the std, and learn nothing; a group of them alone is finite."""
    with_hole = group_advantages(np.array([[1.0, np.nan, 0, 0]]))
    assert with_hole[0, 1] == 0
    np.testing.assert_array_equal(with_hole[0, [0, 2, 3]], group_advantages(np.array([[1.0, 0, 0]]))[0])
    assert not group_advantages(np.full((2, 3), np.nan)).any()
    assert not group_advantages(np.full((2, 3), np.nan), scale="batch").any()


def test_uninformative_groups():
    nan = np.nan
    rewards = [[1, 1, 1], [1, 0, 1], [nan, nan, 1], [nan, 1, 1], [nan, 0, 1], [nan, nan, nan], [1, 1 + 1e-9, 1]]
    rewards = np.array(rewards)
    np.testing.assert_array_equal(uninformative_groups(rewards), [True, False, True, True, False, True, True])
    assert not group_advantages(rewards, scale="none")[[0, 2, 3, 5]].any()
