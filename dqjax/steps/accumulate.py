"""Gradients of a global batch in micro-batches."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from typing import Any

from dqjax.types import Batch, Loss, Max, Mean, Metrics, Params


def split_batch(batch: Batch, parts: int) -> Batch:
    """`[B, …]` leaves to `[parts, B/parts, …]`: micro-batch i takes rows i, i + parts, …, so that no row changes device.

    Raises:
      ValueError: B is not a multiple of `parts`.
    """
    rows = batch.tokens.shape[0]
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows cannot be split into {parts} micro-batches; parts must divide it")
    return jax.tree.map(lambda x: x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def accumulated_gradients(
    loss: Loss, params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray, parts: int
) -> tuple[Params, Float[Array, ""], Metrics]:
    """Gradients and value of the loss, summed over `parts` micro-batches.

    Since `token_weight` carries the normalisation over the global batch, the sum over micro-batches *is* the loss of the
    batch: the result does not depend on `parts`.

    Returns:
      (gradients like `params`, loss, metrics).
    """
    gradient = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, metrics), grads = gradient(params, frozen, batch, key)
        return grads, value, metrics

    def body(total, part):
        micro, key = part
        (value, metrics), grads = gradient(params, frozen, micro, key)
        return jax.tree.map(jnp.add, total, grads), (value, metrics)

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, (values, stacked) = jax.lax.scan(body, zeros, (split_batch(batch, parts), jax.random.split(key, parts)))
    metrics = {
        name: Max(jnp.max(m.value, 0)) if isinstance(m, Max) else Mean(jnp.sum(m.total, 0), jnp.sum(m.count, 0))
        for name, m in stacked.items()
    }
    return grads, jnp.sum(values), metrics
