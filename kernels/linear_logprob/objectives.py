"""Per-row objectives on a tile of logits: their value and, by hand, their gradient in the logits.

An objective is called as `objective(head, logits, columns, rows, table)` with the logits of some rows against this
shard's whole table, and what else it needs of these rows and of the teacher. The caller weighs what it returns.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dqjax.kernels.linear_logprob.head import MASKED, Head
from dqjax.kernels.linear_logprob.teacher import TopK


class Graded(NamedTuple):
    """What an objective makes of its rows.

    Attributes:
      value: what is to be weighed and summed.
      aux: a number a row for the caller's eyes.
      d_logits: ∂value/∂logits.
    """

    value: Float[Array, "M"]
    aux: Float[Array, "M"]
    d_logits: Float[Array, "M V"]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """-log p(label) + z_loss · lse², with d_logits = (1 + 2 z_loss lse) p - 1[label]."""

    z_loss: float

    def __call__(
        self, head: Head, z: Float[Array, "M V"], columns: Int[Array, "V"], labels: Int[Array, "M"], _: None
    ) -> Graded:
        lse, p = _softmax(head, z)
        hit = columns == labels[:, None]
        logprob = head.sum(jnp.sum(jnp.where(hit, z, 0), axis=-1)) - lse
        if head.vocab is not None:
            logprob = jnp.where(labels < head.vocab, logprob, MASKED)
        if self.z_loss == 0:
            return Graded(-logprob, logprob, p - hit)
        return Graded(self.z_loss * lse**2 - logprob, logprob, p * (1 + 2 * self.z_loss * lse)[:, None] - hit)


class Heads(NamedTuple):
    """Logits and lse of student and teacher; of tables of unlike width, the tokens that both have come first."""

    z: Float[Array, "M V"]
    lse: Float[Array, "M"]
    z_teacher: Float[Array, "M U"]
    lse_teacher: Float[Array, "M"]

    def distributions(self) -> tuple[jax.Array, ...]:
        """p, log p, q and log q of the shared tokens."""
        shared = min(self.z.shape[1], self.z_teacher.shape[1])
        logp = self.z[:, :shared] - self.lse[:, None]
        logq = self.z_teacher[:, :shared] - self.lse_teacher[:, None]
        return jnp.exp(logp), logp, jnp.exp(logq), logq


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Generalised Jensen-Shannon divergence between student p and teacher q (Agarwal et al., GKD, 2024, eq. 1).

    With m = (1 - β) p + β q::

        β = 0      Σ q (log q - log p)                                   forward KL
        β = 1      Σ p (log p - log q)                                   reverse KL
        else       β Σ q (log q - log m) + (1 - β) Σ p (log p - log m)

    The gradient in the logits is g - p Σ g with g = p ∂/∂p, up to multiples of p, which cancel: -q, p (log p - log q),
    and (1 - β) p (log p - log m).

    Attributes:
      beta: β, as in TRL's `generalized_jsd_loss`.
      tail: for a `TopK` teacher, "bucket" or "renormalise".
    """

    beta: float
    tail: str

    def __call__(
        self,
        head: Head,
        z: Float[Array, "M V"],
        columns: Int[Array, "V"],
        teacher: Float[Array, "M E"] | TopK,
        table: Float[Array, "U E"] | None,
    ) -> Graded:
        if isinstance(teacher, TopK):
            return self._against_top_k(head, z, columns, teacher)
        z_teacher = head.logits(teacher, table, head.columns(0, len(table), len(table)))
        return self.between(head, Heads(z, _softmax(head, z)[0], z_teacher, _softmax(head, z_teacher)[0]))

    def between(self, head: Head, heads: Heads) -> Graded:
        """The divergence of two heads, in a pass over their logits for its value and Σ g, and one for the gradient.

        Of two sums XLA would write the terms to memory, of a complex one it does not; nor log m, past the barrier.
        """
        value, g = self._terms(*heads.distributions())
        both = jnp.sum(lax.complex(value, g), axis=-1)
        value, total = head.sum(both.real), head.sum(both.imag)
        heads, total = lax.optimization_barrier((heads, total))
        p, *others = heads.distributions()
        _, g = self._terms(p, *others)
        d_logits = jnp.pad(g - p * total[:, None], ((0, 0), (0, heads.z.shape[1] - p.shape[1])))
        return Graded(value, value, d_logits)

    def _against_top_k(self, head, z, columns, teacher):
        kept, logq_k, logq_tail = teacher.distribution(self.tail)
        rows, width = jnp.arange(z.shape[0])[:, None], z.shape[1]
        place = teacher.ids - columns[0]  # in this shard's table; elsewhere it is dropped
        mine = kept & (place >= 0) & (place < width)
        place = jnp.where(mine, place, width)
        others = z.at[rows, place].set(MASKED, mode="drop")
        z_k = jnp.where(mine, jnp.take_along_axis(z, jnp.minimum(place, width - 1), axis=-1), MASKED)
        peak = head.max(lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True)))
        weights = jnp.exp(others - peak)
        rest = head.sum(jnp.sum(weights, axis=-1, keepdims=True))
        total = rest + head.sum(jnp.sum(jnp.where(mine, jnp.exp(z_k - peak), 0), axis=-1, keepdims=True))
        # The k entries are graded by the shard that holds them, the bucket of all others by every shard alike.
        logp_k = jnp.where(mine, z_k - peak - jnp.log(total), MASKED)
        rest = jnp.maximum(rest, jnp.finfo(z.dtype).tiny)
        logp_tail = jnp.log(rest) - jnp.log(total)
        value_k, g_k = self._terms(jnp.exp(logp_k), logp_k, jnp.where(mine, jnp.exp(logq_k), 0), logq_k)
        value_tail, g_tail = self._terms(jnp.exp(logp_tail), logp_tail, jnp.exp(logq_tail), logq_tail)
        value = head.sum(jnp.sum(value_k, axis=-1)) + value_tail[:, 0]
        total_g = head.sum(jnp.sum(g_k, axis=-1, keepdims=True)) + g_tail
        d_logits = weights / rest * g_tail - weights / total * total_g
        d_logits = d_logits.at[rows, place].set(g_k - jnp.exp(logp_k) * total_g, mode="drop")
        return Graded(value, value, d_logits)

    def _terms(self, p, logp, q, logq):
        """Each outcome's part of the divergence, and g."""
        if self.beta == 0:
            return q * (logq - logp), -q
        if self.beta == 1:
            term = p * (logp - logq)
            return term, term
        # Where p and q are 0 to the machine, so are both terms, whatever log m is.
        logm = jnp.log(jnp.maximum((1 - self.beta) * p + self.beta * q, jnp.finfo(p.dtype).tiny))
        of_p = (1 - self.beta) * p * (logp - logm)
        return self.beta * q * (logq - logm) + of_p, of_p


def _softmax(head: Head, z: Float[Array, "M V"]) -> tuple[Float[Array, "M"], Float[Array, "M V"]]:
    """lse over the whole vocabulary and the softmax's entries for this shard's columns."""
    peak = head.max(jnp.max(z, axis=-1))
    total = head.sum(jnp.sum(jnp.exp(z - peak[:, None]), axis=-1))
    lse = peak + jnp.log(total)
    return lse, jnp.exp(z - lse[:, None])
