"""Log-probabilities and entropies of the targets of a packed batch, without ever holding its logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dqjax.kernels.linear_logprob import api as kernel
from dqjax.losses.shard import per_device, rows_spec, table_spec
from dqjax.sharding import Rules


def token_logprobs(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    rules: Rules,
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """log softmax(hidden · tableᵀ / temperature)[target], and the entropy of that softmax in nats.

    Differentiable with any cotangent. Where `mask` is false both are 0 and have no gradient, whatever `hidden` holds.

    Args:
      temperature: the one the samples were drawn with, positive.
      vocab: real entries of the table; None means all.
      backend: of `kernels.linear_logprob`.
    """
    rows, columns = rows_spec(rules, hidden.shape[0]), table_spec(rules, table.shape)

    def local(hidden, table, labels):
        logprob, _, entropy = kernel.linear_logprob(
            hidden.reshape(-1, hidden.shape[-1]),
            table,
            labels.reshape(-1),
            vocab=vocab,
            temperature=temperature,
            axis_name=columns[0],
            backend=backend,
        )
        return logprob.reshape(labels.shape), entropy.reshape(labels.shape)

    local = per_device(local, rules, (rows, columns, rows), (rows, rows))
    return local(hidden, table, jnp.where(mask, jax.lax.stop_gradient(targets), -1))
