"""The Bradley-Terry loss of a reward model, and how well its probabilities are calibrated."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dqjax.losses.pairs import Pairs
from dqjax.types import Mean, Metrics

CALIBRATION_BINS = 10


def bradley_terry_loss(
    scores: Float[Array, "B S"],
    pairs: Pairs,
    *,
    margin: Float[Array, "B S"] | None = None,
    centering: float = 0.0,
) -> tuple[Float[Array, ""], Metrics]:
    """Σ weight · (−log σ(r_c − r_r − margin) + centering · (r_c + r_r)²), a mean over pairs as they are weighed.

    Bradley & Terry, 1952; for language models https://arxiv.org/abs/2203.02155, eq. 1; the margin is Llama 2's
    (https://arxiv.org/abs/2307.09288, eq. 2); centering is https://arxiv.org/abs/2312.09244, eq. 2.

    Args:
      scores: r, one a sequence.
      margin: at the chosen sequence's column; None means 0.
      centering: c ≥ 0.

    Returns:
      The weighted sum, and the metrics `loss`, `accuracy` (a tie is wrong), `margin` (of the scores), `score`, and the
      reliability diagram `calibration_confidence` and `calibration_accuracy`, vectors over bins of max(p, 1 − p).
    """
    chosen, rejected = pairs.split(scores)
    difference = chosen - rejected
    loss = -jax.nn.log_sigmoid(difference if margin is None else difference - jnp.where(pairs.present, margin, 0))
    total = jnp.sum(pairs.weight * (loss + centering * (chosen + rejected) ** 2))
    mean = lambda x: mean_over_pairs(x, pairs)  # noqa: E731
    right = (difference > 0).astype(jnp.float32)
    confidence = jax.nn.sigmoid(jnp.abs(difference))
    bins = jnp.clip((2 * confidence - 1) * CALIBRATION_BINS, 0, CALIBRATION_BINS - 1).astype(jnp.int32)
    metrics = {
        "loss": mean(loss),
        "accuracy": mean(right),
        "margin": mean(difference),
        "score": mean((chosen + rejected) / 2),
        "calibration_confidence": mean_by_group(confidence, bins, CALIBRATION_BINS, pairs),
        "calibration_accuracy": mean_by_group(right, bins, CALIBRATION_BINS, pairs),
    }
    return total, jax.lax.stop_gradient(metrics)


def mean_over_pairs(x: Float[Array, "B S"], pairs: Pairs) -> Mean:
    """The mean of `x` over the pairs, each counted once."""
    return Mean(jnp.sum(jnp.where(pairs.present, x, 0)), jnp.sum(pairs.present.astype(jnp.float32)))


def mean_by_group(x: Float[Array, "B S"], group: Array, size: int, pairs: Pairs) -> Mean:
    """The mean of `x` over the pairs of each of `size` groups; pairs of a group outside 0 … size − 1 are left out."""
    flat = jnp.where(pairs.present & (group >= 0), group, size).reshape(-1)
    sums = lambda y: jax.ops.segment_sum(y.reshape(-1), flat, size)  # noqa: E731
    return Mean(sums(jnp.where(pairs.present, x, 0)), sums(pairs.present.astype(jnp.float32)))


def expected_calibration_error(confidence: Mean, accuracy: Mean) -> float:
    """Σ_bins (n / N) · |accuracy − confidence| (https://arxiv.org/abs/1706.04599, eq. 3), on the host.

    NaN without pairs.
    """
    count = np.asarray(confidence.count, np.float64)
    gap = np.abs(np.asarray(accuracy.total, np.float64) - np.asarray(confidence.total, np.float64))
    return float(gap.sum() / count.sum()) if count.sum() else float("nan")
