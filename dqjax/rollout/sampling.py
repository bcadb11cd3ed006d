"""From logits to a token: temperature, top-k, top-p, min-p, one key a sample."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in this order, each to what the one before left.

    temperature: 0 takes the most likely token. top_k: the k most likely (0: all). top_p: the smallest set of the most
    likely whose probability reaches p (https://arxiv.org/abs/1904.09751). min_p: those with at least min_p times the
    probability of the most likely (https://arxiv.org/abs/2407.01082).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for name, ok, expected in [
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
        ]:
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits at the temperature, −inf where top-k, top-p or min-p cut. Ties at a cut are all kept."""
    logits = logits / (sampling.temperature or 1.0)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        falling = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass ahead of each token: the first always stays
        least = jnp.min(jnp.where(before < sampling.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p > 0:
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits < best + jnp.log(sampling.min_p), -jnp.inf, logits)
    return logits


def sample(
    logits: Float[Array, "B V"], keys: Array, indices: Int[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws one token a row.

    Args:
      logits: float32, of the real vocabulary.
      keys: one PRNG key a sample; token t of a sample is drawn with `fold_in(key, t)`, so a sample is the same whatever
        batch it rides in.
      indices: t, the number of tokens the sample already has.

    Returns:
      (token, log p(token)): the log-probability under softmax(logits / temperature) over the full vocabulary, before the
      filters, which is what a trainer recomputes; at temperature 0 it is taken at temperature 1.
    """
    logprobs = jax.nn.log_softmax(logits / (sampling.temperature or 1.0), axis=-1)
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        keys = jax.vmap(jax.random.fold_in)(keys, indices)
        tokens = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling))
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
