"""Ordinal classification: levels 0 … C − 1 with an order, learnt from soft labels."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dqjax.types import Batch, Mean, Metrics


def soft_labels(labels: Float[Array, "*B"], classes: int, smoothing: float) -> Float[Array, "*B {classes}"]:
    """q_k ∝ exp(−(k − y)² / 2 smoothing²): near levels share the mass (SORD, Díaz & Marathe, CVPR 2019, eq. 1–2).

    With smoothing 0 the two levels next to y share it linearly, which for a whole y is all of it on y.

    Args:
      labels: y in 0 … classes − 1; the mean of several judgements need not be whole.
      smoothing: standard deviation in levels.
    """
    distance = jnp.arange(classes) - labels[..., None]
    if smoothing == 0:
        return jnp.maximum(1 - jnp.abs(distance), 0)
    return jax.nn.softmax(-(distance**2) / (2 * smoothing**2), axis=-1)


def expected_level(logits: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """Σ k softmax(logits)_k: the level that minimises the expected squared error."""
    return jax.nn.softmax(logits, axis=-1) @ jnp.arange(logits.shape[-1], dtype=logits.dtype)


def ordinal_loss(
    logits: Float[Array, "B S C"], labels: Float[Array, "B S"], weight: Float[Array, "B S"], *, smoothing: float
) -> tuple[Float[Array, ""], Metrics]:
    """Σ weight · −Σ_k q_k log softmax(logits)_k, with the soft labels q.

    Args:
      labels: a place of weight 0 may hold anything.
      weight: 0 where a label is missing (`weigh_labels`).

    Returns:
      The weighted sum, and the metrics `loss`, `absolute_error` of the expected level, and `confusion` `[C, C]`: shares
      of (nearest level of the label, nearest to the expected level).
    """
    known, classes = weight != 0, logits.shape[-1]
    labels = jnp.where(known, labels, 0).astype(jnp.float32)
    logits = jnp.where(known[..., None], logits, 0)
    loss = -jnp.sum(soft_labels(labels, classes, smoothing) * jax.nn.log_softmax(logits, axis=-1), axis=-1)
    level = expected_level(jax.lax.stop_gradient(logits))
    count = jnp.sum(known.astype(jnp.float32))
    mean = lambda x: Mean(jnp.sum(jnp.where(known, x, 0)), count)  # noqa: E731
    cells = jnp.round(labels).astype(jnp.int32) * classes + jnp.round(level).astype(jnp.int32)
    confusion = jax.ops.segment_sum(known.astype(jnp.float32).reshape(-1), cells.reshape(-1), classes**2)
    metrics = {
        "loss": mean(jax.lax.stop_gradient(loss)),
        "absolute_error": mean(jnp.abs(level - labels)),
        "confusion": Mean(confusion.reshape(classes, classes), jnp.full((classes, classes), count)),
    }
    return jnp.sum(weight * jnp.where(known, loss, 0)), metrics


def count_labels(batch: Batch, names: Sequence[str], *, classes: int) -> dict[str, int]:
    """Sequences that have each label, in a batch of numpy arrays; those of several hosts add up.

    Raises:
      ValueError: a label above classes − 1.
    """
    return {name: int(known.sum()) for name, known in _known(batch, names, classes).items()}


def weigh_labels(
    batch: Batch, names: Sequence[str], *, classes: int, totals: Mapping[str, int] | None = None
) -> Batch:
    """The batch with `side["<name>_weight"]` = 1 / (sequences that have the label), 0 where it is missing, on the host.

    A label below 0 or NaN is missing; it is never taken for 0.

    Args:
      totals: counts over the global batch, where this is a part of it.

    Raises:
      ValueError: a label above classes − 1.
    """
    weights = {}
    for name, known in _known(batch, names, classes).items():
        total = known.sum() if totals is None else totals[name]
        weights[f"{name}_weight"] = (known / max(total, 1)).astype(np.float32)
    return dataclasses.replace(batch, side={**batch.side, **weights})


def _known(batch: Batch, names: Sequence[str], classes: int) -> dict[str, np.ndarray]:
    index, real = np.asarray(batch.sequence_index), np.asarray(batch.segment_ids) > 0
    known = {}
    for name in names:
        labels = np.asarray(batch.side[name])
        present = np.zeros(labels.shape, bool)
        row = np.broadcast_to(np.arange(len(index))[:, None], index.shape)
        present[row[real], index[real]] = True
        known[name] = present & (labels >= 0)  # false for NaN
        if (too_high := labels[known[name]] > classes - 1).any():
            raise ValueError(f"label {name!r}: expected 0 to {classes - 1}, got {labels[known[name]][too_high][0]}")
    return known


def quadratic_weighted_kappa(confusion: Float[np.ndarray, "C C"]) -> float:
    """1 − Σ w O / Σ w E, w = (i − j)², E the product of O's margins (Cohen, 1968): 1 is agreement, 0 is chance.

    Args:
      confusion: counts or shares of (label, prediction).

    Returns:
      NaN where nothing was counted, or label and prediction are one and the same constant.
    """
    observed = np.asarray(confusion, np.float64)
    if not observed.sum():
        return float("nan")
    observed = observed / observed.sum()
    levels = np.arange(len(observed))
    squares = (levels[:, None] - levels) ** 2
    chance = (squares * np.outer(observed.sum(1), observed.sum(0))).sum()
    return float(1 - (squares * observed).sum() / chance) if chance else float("nan")
