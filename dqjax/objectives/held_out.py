"""Evaluation of the objectives whose numbers are made of whole sums: calibration errors, kappas."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dqjax.metrics import scalars
from dqjax.objectives.setup import Evaluate, Place
from dqjax.types import Batch, Loss, Mean, Metrics, Params, merge_metrics

Summarise = Callable[[Metrics], dict[str, float]]


def measure_sums(
    loss: Loss, batches: Iterable[Batch], place: Place, labels: Mapping[str, Sequence[str]], summarise: Summarise
) -> Evaluate:
    """`setup.measure`, with what `summarise` makes of the metrics once all batches are added up."""
    metrics_of = jax.jit(lambda params, frozen, batch, key: loss(params, frozen, batch, key)[1])

    def evaluate(params: Params, frozen: Any) -> tuple[dict[str, float], dict[str, str]]:
        total: Metrics = {}
        for batch in batches:
            total = merge_metrics(total, metrics_of(params, frozen, place(batch), jax.random.key(0)))
        total = jax.device_get(total)
        return scalars(without_matrices(total), labels) | summarise(total), {}

    return evaluate


def without_matrices(metrics: Metrics) -> Metrics:
    """The metrics that can be written as numbers: a confusion matrix is for `summarise`."""
    return {name: m for name, m in metrics.items() if not (isinstance(m, Mean) and np.ndim(m.total) > 1)}
