"""From logits to a token: temperature, top-k, top-p, min-p, one key a sample.

A vocabulary of 152k is never sorted. Each filter is a floor under the logits: top-k looks only into the k blocks of the
largest maxima, top-p bisects. A token is then drawn by its cumulative weight, block first, so that a row costs two
random numbers and not one for every entry.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

BLOCK = 128


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
        kept = _largest(logits, sampling.top_k)
        logits = _cut(logits, kept[:, -1:])
        if sampling.top_p < 1:
            logits = _cut(logits, _nucleus_floor_of_sorted(kept, logits, sampling.top_p))
    elif sampling.top_p < 1:
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probabilities < _nucleus_floor(probabilities, sampling.top_p), -jnp.inf, logits)
    if sampling.min_p > 0:
        logits = _cut(logits, jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p))
    return logits


def sample(
    logits: Float[Array, "B V"],
    keys: Array,
    indices: Int[Array, "B"],
    sampling: Sampling,
    forced: Int[Array, "B"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws one token a row.

    Args:
      logits: float32; −inf for entries that are no token.
      keys: one PRNG key a sample; token t of a sample is drawn with `fold_in(key, t)`, so a sample is the same whatever
        batch it rides in.
      indices: t, the number of tokens the sample already has.
      forced: tokens to take instead of drawing; below 0: draw.

    Returns:
      (token, log p(token)): the log-probability under softmax(logits / temperature) over the full vocabulary, before
      the filters, which is what a trainer recomputes; at temperature 0 it is taken at temperature 1.
    """
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        tokens = draw(filter_logits(logits, sampling), jax.vmap(jax.random.fold_in)(keys, indices))
    tokens = tokens.astype(jnp.int32)
    if forced is not None:
        tokens = jnp.where(forced >= 0, forced, tokens)
    logits = logits / (sampling.temperature or 1.0)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(_log_masses(_blocks(logits)), axis=-1)


def draw(logits: Float[Array, "B V"], keys: Array) -> Int[Array, "B"]:
    """One index a row from softmax(logits): a block by the blocks' weights, then an entry of it by its own."""
    blocks = _blocks(logits)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _pick(_log_masses(blocks), uniform[:, :1])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _pick(inside, uniform[:, 1:])


def _log_masses(blocks: Float[Array, "B n 128"]) -> Float[Array, "B n"]:
    """log Σ exp(logits) of each block: the only pass over the logits that drawing and the log-probability take."""
    peak = jnp.maximum(jnp.max(blocks, axis=-1, keepdims=True), jnp.finfo(blocks.dtype).min)
    return jnp.squeeze(peak + jnp.log(jnp.sum(jnp.exp(blocks - peak), axis=-1, keepdims=True)), -1)


def _pick(logits: Float[Array, "B n"], uniform: Float[Array, "B 1"]) -> Int[Array, "B"]:
    """The first entry whose cumulative weight passes `uniform` of the total; never one without weight."""
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    cumulative = jnp.cumsum(weights, axis=-1)
    passed = cumulative > uniform * cumulative[:, -1:]
    return jnp.argmax(jnp.where(weights > 0, 1 + passed, 0), axis=-1)


def _cut(logits: Float[Array, "B V"], floor: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    return jnp.where(logits < floor, -jnp.inf, logits)


def _blocks(logits: Float[Array, "B V"]) -> Float[Array, "B n 128"]:
    """Rows in blocks of `BLOCK` entries, the last one filled up with −inf."""
    logits = jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % BLOCK)), constant_values=-jnp.inf)
    return logits.reshape(len(logits), -1, BLOCK)


def _largest(logits: Float[Array, "B V"], k: int) -> Float[Array, "B k"]:
    """The k largest logits of a row, falling.

    They lie in the k blocks of the largest maxima: any entry elsewhere is below k maxima.
    """
    blocks = _blocks(logits)
    if blocks.shape[1] > k:
        best = lax.top_k(jnp.max(blocks, axis=-1), k)[1]
        logits = jnp.take_along_axis(blocks, best[:, :, None], axis=1).reshape(len(logits), -1)
    return lax.top_k(logits, k)[0]


def _nucleus_floor_of_sorted(
    falling: Float[Array, "B k"], logits: Float[Array, "B V"], p: float
) -> Float[Array, "B 1"]:
    """The least logit of the nucleus, where `falling` are the largest of `logits` and nothing below them is left."""
    probabilities = jnp.exp(falling - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # mass ahead of each token: the first always stays
    return jnp.min(jnp.where(before < p, falling, jnp.inf), axis=-1, keepdims=True)


def _nucleus_floor(probabilities: Float[Array, "B V"], p: float) -> Float[Array, "B 1"]:
    """The least x with P(probability > x) < p.

    Found by bisection over the bits of a float, which for positive ones are in its order: 30 sums, where a sort would
    take longer.
    """

    def halve(_, ends):
        low, high = ends  # P(above low) >= p > P(above high)
        middle = (low + high) // 2
        above = probabilities > lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(above, probabilities, 0), axis=-1, keepdims=True) < p
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    high = lax.bitcast_convert_type(jnp.max(probabilities, axis=-1, keepdims=True), jnp.int32)
    _, high = lax.fori_loop(0, 30, halve, (jnp.zeros_like(high), high))
    return lax.bitcast_convert_type(high, jnp.float32)
