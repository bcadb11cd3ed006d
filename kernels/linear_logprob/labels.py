"""The label's place in a shard of the table, and its logit, for kernels whose tiles know nothing of labels."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.linear_logprob.head import Head


def shard_limit(head: Head, V: int) -> tuple[Int[Array, ""] | int, Int[Array, ""]]:
    """The token of this shard's first row, and how many of its V rows are real tokens."""
    first = head.columns(0, 1, V)[0]
    return first, jnp.int32(V) if head.vocab is None else jnp.clip(head.vocab - first, 0, V)


def label_logits(
    head: Head, x: Float[Array, "M D"], w: Float[Array, "V D"], labels: Int[Array, "M"]
) -> tuple[Float[Array, "M"], Int[Array, "M"]]:
    """The label's logit, and its row in this shard's table: V where it is on another shard or no real token."""
    first, limit = shard_limit(head, len(w))
    place = labels - first
    mine = (place >= 0) & (place < limit)
    at_label = jnp.einsum("MD,MD->M", x, w[jnp.where(mine, place, 0)], preferred_element_type=jnp.float32)
    return head.sum(jnp.where(mine, at_label / head.temperature, 0)), jnp.where(mine, place, len(w))


def put(tile: Float[Array, "M V"], place: Int[Array, "M"], entries: Float[Array, "M"]) -> Float[Array, "M V"]:
    """`tile` with one entry a row replaced; a place outside of the tile leaves the row as it is."""
    rows = jnp.arange(len(place))
    return tile.at[rows, place].set(entries.astype(tile.dtype), mode="drop", unique_indices=True)
