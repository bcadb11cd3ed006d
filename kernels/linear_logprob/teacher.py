"""What a teacher hands over: its head, or the few most likely tokens of each row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dqjax.kernels.linear_logprob.head import MASKED


class TeacherHead(NamedTuple):
    """Final hidden states and output table of the teacher; both are constants to the derivative."""

    x: Float[Array, "M E"]
    w: Float[Array, "U E"]


class TopK(NamedTuple):
    """The teacher's k most likely tokens of each row.

    Attributes:
      ids: distinct tokens of the shared vocabulary; negative marks an empty slot.
      logprobs: their log-probabilities under the teacher's whole softmax, at the temperature of the call.
    """

    ids: Int[Array, "M k"]
    logprobs: Float[Array, "M k"]

    def distribution(self, tail: str) -> tuple[Bool[Array, "M k"], Float[Array, "M k"], Float[Array, "M 1"]]:
        """Which slots are filled, the log-probabilities in them, and the log-probability of all other tokens.

        "bucket" gives the others what is missing to 1, at least one float32 rounding (what is left of 1 - Σ q is then
        only known to that); "renormalise" divides by Σ q and leaves them nothing.
        """
        kept = (self.ids >= 0) & (self.logprobs > MASKED)
        logq = jnp.where(kept, self.logprobs.astype(jnp.promote_types(self.logprobs.dtype, jnp.float32)), MASKED)
        total = jax.nn.logsumexp(logq, axis=-1, keepdims=True)
        if tail == "renormalise":
            return kept, jnp.where(kept, logq - total, MASKED), jnp.full_like(total, MASKED)
        return kept, logq, jnp.log(jnp.maximum(-jnp.expm1(total), jnp.finfo(jnp.float32).eps))
