"""Log-probabilities, cross-entropy and divergences from full logits, with JAX's own gradients: the yardstick."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.linear_logprob.head import MASKED, Head
from dqjax.kernels.linear_logprob.teacher import TeacherHead, TopK


def reference_logprob(
    x: Float[Array, "M D"], w: Float[Array, "V D"], labels: Int[Array, "M"], head: Head
) -> tuple[Float[Array, "M"], Float[Array, "M"], Float[Array, "M"]]:
    """Log-probability of the label, lse and entropy of softmax(x wᵀ / temperature); all 0 where the label is < 0."""
    kept = labels >= 0
    logp, lse = _log_softmax(jnp.where(kept[:, None], x, 0), w, head)
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    logprob = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return tuple(jnp.where(kept, y, 0) for y in (logprob, lse, entropy))


def reference_cross_entropy(
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    labels: Int[Array, "M"],
    weight: Float[Array, "M"],
    z_loss: float,
    head: Head,
) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    """Σ weight (-logprob + z_loss lse²), and logprob."""
    labels = jnp.where(weight != 0, labels, -1)
    logprob, lse, _ = reference_logprob(x, w, labels, head)
    return jnp.sum(weight * (z_loss * lse**2 - logprob)), jax.lax.stop_gradient(logprob)


def reference_divergence(
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    teacher: TeacherHead | TopK,
    weight: Float[Array, "M"],
    beta: float,
    tail: str,
    head: Head,
) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    """Σ weight · divergence, and the divergence, from the two full distributions (over k + 1 outcomes for `TopK`)."""
    kept = weight != 0
    logp, _ = _log_softmax(jnp.where(kept[:, None], x, 0), w, head)
    if isinstance(teacher, TeacherHead):
        logq, _ = _log_softmax(jnp.where(kept[:, None], teacher.x, 0), teacher.w, head)
        vocab = min(logp.shape[1], logq.shape[1]) if head.vocab is None else head.vocab
        logp, logq = logp[:, :vocab], logq[:, :vocab]
    else:
        logp, logq = _bucketed(logp, teacher, tail)
    p, q = jnp.exp(logp), jnp.exp(logq)
    logm = jnp.logaddexp(logp + jnp.log(1 - beta), logq + jnp.log(beta)) if 0 < beta < 1 else None
    if logm is None:
        value = q * (logq - logp) if beta == 0 else p * (logp - logq)
    else:
        value = beta * q * (logq - logm) + (1 - beta) * p * (logp - logm)
    divergence = jnp.where(kept, jnp.sum(value, axis=-1), 0)
    return jnp.sum(weight * divergence), jax.lax.stop_gradient(divergence)


def _log_softmax(x, w, head):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    z = head.logits(x.astype(wide), w.astype(wide), head.columns(0, w.shape[0], w.shape[0]))
    lse = jax.nn.logsumexp(z, axis=-1)
    return z - lse[:, None], lse


def _bucketed(logp, teacher, tail):
    """Student and teacher over the teacher's k tokens and one bucket of all others."""
    kept, logq, log_tail = teacher.distribution(tail)
    at_k = jnp.take_along_axis(logp, jnp.where(kept, teacher.ids, 0), axis=-1)
    others = jnp.ones_like(logp, bool).at[jnp.arange(len(logp))[:, None], jnp.where(kept, teacher.ids, logp.shape[1])]
    others = others.set(False, mode="drop")
    rest = jax.nn.logsumexp(logp, axis=-1, where=others, keepdims=True)
    rest = jnp.maximum(rest, MASKED)  # the k may be all there is
    at_k = jnp.where(kept, at_k, logq)  # an empty slot: no mass on either side
    return jnp.concatenate([at_k, rest], axis=-1), jnp.concatenate([logq, log_tail], axis=-1)
