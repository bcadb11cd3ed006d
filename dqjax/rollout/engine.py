"""Batched generation with the trainer's own model code and weights: prefill, then decode until every row has stopped."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dqjax.models.cache import make_cache
from dqjax.models.decoder import Decoder
from dqjax.rollout.sampling import Sampling, sample
from dqjax.types import Params

PREFILL_BUCKET = 64  # prompts are padded to multiples of this, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids to continue, and the number that seeds its sample (distinct prompts and samples want distinct ones)."""

    token_ids: tuple[int, ...]
    seed: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was generated for one prompt.

    Attributes:
      token_ids: the new tokens, the stop token included.
      logprobs: the sampler's own log-probability of each, see `sampling.sample`.
      finish_reason: "stop" at a stop token, "length" at the limit.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


class Engine:
    """Generates for many prompts, `rows` at a time.

    Args:
      decoder: the model; the cache is kept in its dtype.
      stop_ids: tokens that end a sample (Qwen: end of text and end of turn).
      vocab: real entries of the output table; padded ones are never sampled.
      rows: sequences decoded together, a multiple of the mesh's batch shards.
      max_new_tokens: the limit of every sample.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop_ids: Sequence[int],
        vocab: int,
        sampling: Sampling,
        rows: int,
        max_new_tokens: int,
        seed: int = 0,
    ):
        if not stop_ids:
            raise ValueError("no stop ids: every sample would run to max_new_tokens; give the tokenizer's end-of-turn id")
        if rows % decoder.rules.batch_shards:
            raise ValueError(f"rows: {rows} sequences do not divide over {decoder.rules.batch_shards} batch shards of the mesh")
        self._decoder, self._rows, self._limit, self._seed = decoder, rows, max_new_tokens, seed
        self._generate = jax.jit(
            functools.partial(_generate, decoder, tuple(stop_ids), vocab, sampling, max_new_tokens),
            out_shardings=decoder.rules.sharding(()),  # whole on every host, to be read there
        )

    def generate(self, params: Params, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Samples in the order of the prompts; yields as batches finish.

        Raises:
          ValueError: an empty prompt.
        """
        chunk: list[Prompt] = []
        for prompt in prompts:
            if not prompt.token_ids:
                raise ValueError("an empty prompt: there is no token to continue")
            chunk.append(prompt)
            if len(chunk) == self._rows:
                yield from self._batch(params, chunk)
                chunk = []
        if chunk:
            yield from self._batch(params, chunk)

    def _batch(self, params: Params, prompts: Sequence[Prompt]) -> Iterator[Sample]:
        width = -(-max(len(p.token_ids) for p in prompts) // PREFILL_BUCKET) * PREFILL_BUCKET
        tokens, lengths = np.zeros((self._rows, width), np.int32), np.zeros(self._rows, np.int32)
        seeds = np.zeros(self._rows, np.uint32)
        for i, prompt in enumerate(prompts):
            lengths[i], seeds[i] = len(prompt.token_ids), prompt.seed & 0xFFFFFFFF
            tokens[i, : lengths[i]] = prompt.token_ids
        base = jax.random.key(self._seed)
        out, logprobs, counts, stopped = jax.device_get(self._generate(params, tokens, lengths, seeds, base))
        for i in range(len(prompts)):
            n = counts[i]
            yield Sample(
                tuple(out[i, :n].tolist()), tuple(logprobs[i, :n].tolist()), "stop" if stopped[i] else "length"
            )


def _generate(
    decoder: Decoder,
    stop_ids: tuple[int, ...],
    vocab: int,
    sampling: Sampling,
    limit: int,
    params: Params,
    tokens: Array,
    lengths: Array,
    seeds: Array,
    base: Array,
) -> tuple[Array, Array, Array, Array]:
    """Prefills right-padded prompts `[B, T]`, then decodes; returns tokens, logprobs `[B, limit]`, counts, stopped `[B]`."""
    rows, width = tokens.shape
    keys = jax.vmap(lambda s: jax.random.fold_in(base, s))(seeds)
    stops = jnp.asarray(stop_ids, jnp.int32)
    table = decoder.output_table(params)
    real = lengths > 0

    def draw(hidden, counts):
        logits = jnp.einsum(
            "BD,VD->BV", hidden, table[:vocab], preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
        )
        return sample(logits, keys, counts, sampling)

    cache = make_cache(decoder.config, decoder.rules, rows=rows, capacity=width + limit, dtype=decoder.dtype)
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    hidden, cache = decoder.apply(params, tokens, positions, segments, cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    counts = jnp.zeros((rows,), jnp.int32)
    token, logprob = draw(last, counts)
    out, out_logprobs = jnp.zeros((rows, limit), jnp.int32), jnp.zeros((rows, limit), jnp.float32)

    def record(out, out_logprobs, counts, active, token, logprob):
        slot = jnp.where(active, counts, limit)
        index = jnp.arange(rows)
        return (
            out.at[index, slot].set(token, mode="drop"),
            out_logprobs.at[index, slot].set(logprob, mode="drop"),
            counts + active,
        )

    out, out_logprobs, counts = record(out, out_logprobs, counts, real, token, logprob)
    stopped = jnp.isin(token, stops)
    active = real & ~stopped & (counts < limit)

    def proceed(loop):
        return jnp.any(loop[-1])

    def body(loop):
        cache, out, out_logprobs, counts, token, stopped, active = loop
        position = (lengths + counts - 1)[:, None]
        hidden, cache = decoder.apply(params, token[:, None], position, active.astype(jnp.int32)[:, None], cache)
        new, logprob = draw(hidden[:, 0], counts)
        token = jnp.where(active, new, token)
        out, out_logprobs, counts = record(out, out_logprobs, counts, active, token, logprob)
        stopped = jnp.where(active, jnp.isin(token, stops), stopped)
        return cache, out, out_logprobs, counts, token, stopped, active & ~stopped & (counts < limit)

    loop = (cache, out, out_logprobs, counts, token, stopped, active)
    _, out, out_logprobs, counts, _, stopped, _ = jax.lax.while_loop(proceed, body, loop)
    return out, out_logprobs, counts, stopped & real
