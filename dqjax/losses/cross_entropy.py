"""Weighted cross-entropy of a batch, without ever holding its logits."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dqjax.kernels.linear_logprob import api as kernel
from dqjax.sharding import Rules
from dqjax.types import Batch


def cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    batch: Batch,
    rules: Rules,
    *,
    z_loss: float = 0.0,
    vocab: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Σ weight · (−log p(target) + z_loss · lse²) over the batch.

    z_loss is PaLM's auxiliary term (https://arxiv.org/abs/2204.02311, section 5): it keeps the softmax normaliser near 1.

    Args:
      hidden, table: logits are `hidden @ table.T`, the table split over the tensor axis or whole.
      batch: targets and token_weight; weight 0 takes a token out.
      vocab: real entries of the table; None means all.

    Returns:
      The weighted sum, and log p(target) of every position (0 where the weight is 0; not differentiable).
    """
    table_spec = rules.spec(("vocab_in_use", "table"), table.shape)
    rows = PartitionSpec(rules.spec(("batch",), hidden.shape[:1])[0])

    def local(hidden, table, targets, weight):
        flat = hidden.reshape(-1, hidden.shape[-1])
        labels = jnp.where(weight > 0, targets, -1).reshape(-1)
        loss, logprob = kernel.linear_cross_entropy(
            flat, table, labels, weight.reshape(-1), z_loss=z_loss, vocab=vocab, axis_name=table_spec[0], backend=backend
        )
        return loss[None], logprob.reshape(targets.shape)

    if rules.mesh.size > 1:
        local = functools.partial(
            jax.shard_map,
            mesh=rules.mesh,
            in_specs=(rows, table_spec, rows, rows),
            out_specs=(rows, rows),
            check_vma=False,
        )(local)
    loss, logprob = local(hidden, table, batch.targets, batch.token_weight)
    return jnp.sum(loss), logprob
