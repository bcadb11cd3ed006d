"""The most likely tokens at every place of a packed batch, without ever holding its logits: what a cache keeps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.linear_logprob.head import Head
from dqjax.losses.shard import per_device, rows_spec, table_spec
from dqjax.sharding import Rules

_LOGITS = 1 << 26  # held at a time: 256 MiB of float32


def top_k_logprobs(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    rules: Rules,
    *,
    k: int,
    temperature: float = 1.0,
    vocab: int | None = None,
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"], Float[Array, "B T"]]:
    """Ids and log-probabilities of the k most likely tokens, and the log-probability of all others together.

    log softmax(hidden · tableᵀ / temperature) over the first `vocab` tokens. The tail is what the k leave of 1, at
    least one float32 rounding, as `losses.distillation.top_k_divergence` counts it.

    Raises:
      ValueError: k is not between 1 and the number of tokens.
    """
    if not 1 <= k <= (vocab or len(table)):
        raise ValueError(f"top_k_logprobs: expected k from 1 to {vocab or len(table)}, the number of tokens, got {k}")
    rows, columns = rows_spec(rules, hidden.shape[0]), table_spec(rules, table.shape)
    head = Head(vocab, temperature, columns[0])

    def chunk_of(w):
        ids = head.columns(0, len(w), len(w))

        def chunk(x):
            z = head.logits(x, w, ids)
            best, at = jax.lax.top_k(z, min(k, len(w)))
            best_ids = ids[at]
            top = head.max(best[:, :1])
            lse = top + jnp.log(head.sum(jnp.sum(jnp.exp(z - top), axis=1, keepdims=True)))
            if head.axis_name is not None:  # the best of each shard's best
                best, best_ids = (jax.lax.all_gather(a, head.axis_name, axis=1, tiled=True) for a in (best, best_ids))
                best, at = jax.lax.top_k(best, k)
                best_ids = jnp.take_along_axis(best_ids, at, axis=1)
            return best_ids, best - lse

        return chunk

    def local(hidden, w):
        x = hidden.reshape(-1, hidden.shape[-1])
        size = max(1, min(len(x), _LOGITS // len(w)))
        ids, logprobs = jax.lax.map(chunk_of(w), _padded(x, -len(x) % size).reshape(-1, size, x.shape[1]))
        return tuple(a.reshape(-1, k)[: len(x)].reshape(*hidden.shape[:2], k) for a in (ids, logprobs))

    ids, logprobs = per_device(local, rules, (rows, columns), (rows, rows))(hidden, table)
    left = -jnp.expm1(jax.nn.logsumexp(logprobs, axis=-1))
    return ids, logprobs, jnp.log(jnp.maximum(left, jnp.finfo(jnp.float32).eps))


def _padded(x: Float[Array, "M D"], more: int) -> Float[Array, "N D"]:
    return jnp.pad(x, ((0, more), (0, 0)))
