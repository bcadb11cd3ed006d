"""The output head as the kernels see it: logits of a part of the vocabulary, masked and scaled, and its reductions."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dqjax.kernels.varying import varying_axes

MASKED = -1e30
"""Logit of an entry past the real vocabulary: far below any real logit, and finite."""


@dataclasses.dataclass(frozen=True)
class Head:
    """The static part of a call.

    Attributes:
      vocab: number of real entries over all shards; table rows from there on are masked out. None: all are real.
      temperature: logits are divided by it.
      axis_name: mesh axis over which the table's rows are split, in order.
    """

    vocab: int | None
    temperature: float
    axis_name: str | None

    def columns(self, start: Int[Array, ""] | int, size: int, local_size: int) -> Int[Array, "V"]:
        """Token ids of `size` rows of this shard's table from row `start` on; `local_size` rows make a shard."""
        first = start if self.axis_name is None else start + lax.axis_index(self.axis_name) * local_size
        return first + jnp.arange(size, dtype=jnp.int32)

    def logits(
        self, x: Float[Array, "M D"], w: Float[Array, "V D"], columns: Int[Array, "V"]
    ) -> Float[Array, "M V"]:
        """x wᵀ / temperature in float32 at least, `MASKED` past the vocabulary."""
        z = jnp.einsum("MD,VD->MV", x, w, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        if self.temperature != 1:
            z = z / self.temperature
        return z if self.vocab is None else jnp.where(columns < self.vocab, z, MASKED)

    def sum(self, x: jax.Array) -> jax.Array:
        """`x` summed over the shards of the vocabulary."""
        return x if self.axis_name is None else lax.psum(x, self.axis_name)

    def max(self, x: jax.Array) -> jax.Array:
        """The largest `x` over the shards of the vocabulary."""
        return x if self.axis_name is None else lax.pmax(x, self.axis_name)

    def cotangent(self, g: jax.Array, w: jax.Array) -> jax.Array:
        """The cotangent of a result that the shards share, as each shard's backward pass needs it.

        With `check_vma=True`, shard_map hands every shard the whole cotangent. With `check_vma=False` it hands out
        1/n of it to each of n shards, counting on the transpose of psum, which is psum, to add them up again.
        """
        unchecked = self.axis_name is not None and self.axis_name not in varying_axes(w)
        return lax.psum(g, self.axis_name) if unchecked else g
