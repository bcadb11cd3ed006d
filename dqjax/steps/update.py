"""One training step, whatever the objective: gradients, update, metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dqjax.steps.accumulate import accumulated_gradients
from dqjax.steps.state import State
from dqjax.types import Batch, Loss, Max, Mean, Metrics

Step = Callable[[State, Any, Batch], tuple[State, Metrics]]


def make_step(loss: Loss, optimizer: optax.GradientTransformation, *, accumulate: int = 1) -> Step:
    """A pure step `(state, frozen, batch) → (state, metrics)`.

    A step whose loss or gradient is not finite changes nothing but the step counter, and counts in the metric `skipped`.

    Args:
      loss: the objective; `frozen` (a teacher, a reference, a LoRA base) is handed through to it.
      accumulate: micro-batches a global batch is split into; changes memory, not results.
    """

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grads, value, metrics = accumulated_gradients(loss, state.params, frozen, batch, key, accumulate)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        state = State(
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            key=state.key,
        )
        scalars = {"objective": Mean(value, 1.0), "gradient_norm": Max(norm), "skipped": Mean(1.0 - finite, 1.0)}
        return state, {**metrics, **scalars, "work": Mean(_work(batch), 1.0)}

    return step


def _work(batch: Batch) -> Float[Array, "3"]:
    """Real tokens, tokens in the loss, and (query, key) pairs of the global batch, which no host sees whole."""
    real = batch.segment_ids > 0
    counts = real, batch.token_weight > 0, jnp.where(real, batch.positions + 1, 0)
    return jnp.stack([jnp.sum(x.astype(jnp.float32)) for x in counts])


def compile_step(step: Step, shardings: State) -> Step:
    """`step` under jit: the state donated, its new value laid out as the old one."""
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
