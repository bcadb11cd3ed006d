"""From the rewards of groups of samples to advantages, on the host, before samples are packed."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]


def group_advantages(
    rewards_PG: Float[np.ndarray, "P G"], *, scale: Scale = "group", baseline: Baseline = "mean", eps: float = 1e-4
) -> Float[np.ndarray, "P G"]:
    """A = (r − baseline) / (std + eps), over the G samples of each of P prompts.

    GRPO (https://arxiv.org/abs/2402.03300, section 4.1.2) takes the group's mean as the baseline and its std (ddof = 1,
    as TRL does) as the scale. `scale="none"` is Dr. GRPO's (https://arxiv.org/abs/2503.20783), `"batch"` the std over
    all rewards (https://arxiv.org/abs/2508.08221). `baseline="leave_one_out"` is RLOO
    (https://arxiv.org/abs/2402.14740): each sample against the mean of the others, G / (G − 1) times the other
    form; use it with `scale="none"`.

    Args:
      rewards_PG: NaN marks a sample without a reward (missing, or its grader failed): it leaves baseline and std
        alone and its advantage is 0.
      eps: keeps a group of equal rewards finite.

    Returns:
      float32; each row sums to 0 up to rounding.
    """
    rewards = np.asarray(rewards_PG, np.float64)
    valid = ~np.isnan(rewards)
    count = valid.sum(axis=1, keepdims=True)
    filled = np.where(valid, rewards, 0.0)
    mean = filled.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(valid, rewards - mean, 0.0)
    match scale:
        case "group":
            std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
        case "batch":
            std = np.std(rewards[valid], ddof=1) if valid.sum() > 1 else 0.0
    advantages = centred
    if baseline == "leave_one_out":
        advantages = advantages * count / np.maximum(count - 1, 1)
    if scale != "none":
        advantages = advantages / (std + eps)
    return advantages.astype(np.float32)


def uninformative_groups(rewards_PG: Float[np.ndarray, "P G"], *, tolerance: float = 1e-6) -> Bool[np.ndarray, "P"]:
    """Groups that teach nothing: all rewards equal within `tolerance`, or fewer than two of them.

    Their advantages are 0, so they only dilute the batch: dynamic sampling (DAPO, https://arxiv.org/abs/2503.14476,
    section 3.2) drops them and samples other prompts instead.
    """
    valid = ~np.isnan(rewards_PG)
    highest = np.where(valid, rewards_PG, -np.inf).max(axis=1, initial=-np.inf)
    lowest = np.where(valid, rewards_PG, np.inf).min(axis=1, initial=np.inf)
    return (valid.sum(axis=1) < 2) | (highest - lowest <= tolerance)
