"""What a classification head says of each sequence: its logits at the sequence's last token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.types import Batch


def last_tokens(batch: Batch, columns: int) -> Int[Array, "B {columns}"]:
    """Place in the row of the last token of each sequence; T for columns without one."""
    B, T = batch.tokens.shape
    places = jnp.where(batch.segment_ids > 0, jnp.arange(T, dtype=jnp.int32), -1)
    last = jax.vmap(lambda x, index: jax.ops.segment_max(x, index, columns))(places, batch.sequence_index)
    return jnp.where(last >= 0, last, T)


def sequence_scores(
    hidden: Float[Array, "B T D"], table: Float[Array, "C D"], batch: Batch, columns: int
) -> Float[Array, "B {columns} C"]:
    """hidden[last token] · tableᵀ in float32, as `…ForSequenceClassification` scores: raw, no activation.

    Args:
      table: one row a label.
      columns: S, width of the side arrays. Columns without a sequence score 0.
    """
    places = last_tokens(batch, columns)
    at_last = jnp.take_along_axis(hidden, places[:, :, None], axis=1, mode="fill", fill_value=0)
    return jnp.einsum(
        "BSD,CD->BSC", at_last.astype(jnp.float32), table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
