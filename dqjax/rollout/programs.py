"""The three programs of the engine, all of fixed shapes: prefill a chunk, admit to slots, decode some steps.

::

    prompts --prefill--> lanes [R, room] --admit--> slots [B, capacity] --decode--> tokens [N, B]

A lane holds a prompt but its last token. That token is the first one a slot is fed, so that decoding alone samples, and
a prompt that a group shares is prefilled once and its lane copied to as many slots as it has samples. Slots have a row
of the cache each or, where it has pages, what the host's table gives them; then a group shares the prompt's whole pages.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from dqjax.models.cache import Cache, make_cache
from dqjax.models.decoder import Decoder
from dqjax.rollout.sampling import Sampling, sample
from dqjax.types import Params

NEVER = 2**31 - 1
NOTHING = -1  # in place of a token that an idle slot did not make


class Slots(NamedTuple):
    """B sequences being decoded.

    Attributes:
      cache: `lengths` are the positions of the tokens fed next.
      token: fed next. count: tokens made so far. seed: of the sample.
    """

    cache: Cache
    token: Int[Array, "B"]
    count: Int[Array, "B"]
    seed: UInt[Array, "B"]


class Admission(NamedTuple):
    """Which lane is copied to which slot; a slot past the last one is no entry.

    `length` are the tokens of the lane, `token` the last one of the prompt. `pages` says where the lane goes, page by page,
    if the cache has pages; past the last one, and no two alike, for what is not copied.
    """

    slot: Int[Array, "A"]
    lane: Int[Array, "A"]
    length: Int[Array, "A"]
    token: Int[Array, "A"]
    seed: UInt[Array, "A"]
    pages: Int[Array, "A m"] | None = None


class Made(NamedTuple):
    """What N steps made: tokens (`NOTHING` where a slot was idle) and their log-probabilities."""

    tokens: Int[Array, "N B"]
    logprobs: Float[Array, "N B"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is fixed of decoding.

    Attributes:
      stop_ids: tokens that end a sample.
      closing: tokens that end thinking, to be forced on a sample.
      vocab: real entries of the output table; padded ones are never sampled.
      steps: of one call.
      seed: of the engine; a sample's own seed is folded into it.
    """

    sampling: Sampling
    stop_ids: tuple[int, ...]
    closing: tuple[int, ...]
    vocab: int
    steps: int
    seed: int


def prefill(
    decoder: Decoder,
    params: Params,
    lanes: Cache,
    tokens: Int[Array, "R C"],
    starts: Int[Array, "R"],
    counts: Int[Array, "R"],
) -> Cache:
    """Caches the next chunk of each lane: `counts[r]` tokens from position `starts[r]` on."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    segments = (place < counts[:, None]).astype(jnp.int32)
    return decoder.apply(params, tokens, starts[:, None] + place, segments, lanes._replace(lengths=starts))[1]


def make_slots(decoder: Decoder, *, slots: int, capacity: int, pages: int = 0) -> Slots:
    """Slots without samples: a row of `capacity` positions each, or so many pages of it."""
    rules, row = decoder.rules, decoder.rules.sharding(("batch",), (slots,))
    cache = make_cache(decoder.config, rules, rows=pages or slots, capacity=capacity, dtype=decoder.dtype)
    return Slots(
        cache._replace(lengths=jnp.zeros(slots, jnp.int32, device=row)),
        token=jnp.zeros(slots, jnp.int32, device=row),
        count=jnp.zeros(slots, jnp.int32, device=row),
        seed=jnp.zeros(slots, jnp.uint32, device=row),
    )


def admit(slots: Slots, lanes: Cache, entry: Admission) -> Slots:
    """Starts samples: copies lanes to slots and resets what the slots held."""

    def copy(of_slots, of_lanes):
        rows = of_lanes[entry.lane]
        if entry.pages is None:
            return of_slots.at[entry.slot, : of_lanes.shape[1]].set(rows, mode="drop", unique_indices=True)
        pages = rows.reshape(*entry.pages.shape, *of_slots.shape[1:])
        return of_slots.at[entry.pages].set(pages, mode="drop", unique_indices=True)

    def put(old, new):
        return old.at[entry.slot].set(new, mode="drop", unique_indices=True)

    return Slots(
        Cache(
            tuple(map(copy, slots.cache.keys, lanes.keys)),
            tuple(map(copy, slots.cache.values, lanes.values)),
            put(slots.cache.lengths, entry.length),
        ),
        put(slots.token, entry.token),
        put(slots.count, 0),
        put(slots.seed, entry.seed),
    )


def resize(layer: Float[Array, "B S K H"], capacity: int) -> Float[Array, "B C K H"]:
    """Keys or values of a layer with `capacity` positions, the first ones kept."""
    return jnp.pad(layer[:, :capacity], ((0, 0), (0, max(capacity - layer.shape[1], 0)), (0, 0), (0, 0)))


def decode(
    decoder: Decoder,
    fixed: Decoding,
    params: Params,
    slots: Slots,
    stop_at: Int[Array, "B"],
    force_at: Int[Array, "B"],
    pages: Int[Array, "B n"] | None = None,
) -> tuple[Slots, Made]:
    """Makes up to `fixed.steps` tokens of each sample; a slot whose sample stops is idle for the rest.

    Args:
      params: as `Decoder.unstack` gives them.
      stop_at: number of tokens at which a sample pauses or ends; 0 for a slot without one.
      force_at: number of tokens behind which `fixed.closing` follows, whatever the policy would say; `NEVER`.
      pages: of each slot, enough for all steps, if the cache has pages.
    """
    stops = jnp.asarray(fixed.stop_ids, jnp.int32)
    base = jax.random.key(fixed.seed)
    keys = jax.vmap(lambda seed: jax.random.fold_in(base, seed))(slots.seed)

    def step(carry, _):
        slots, active = carry
        lengths = jnp.where(active, slots.cache.lengths, 0)  # an idle slot has nothing to read
        cache = slots.cache._replace(lengths=lengths, pages=pages)
        segments = active[:, None].astype(jnp.int32)
        hidden, cache = decoder.apply(params, slots.token[:, None], cache.lengths[:, None], segments, cache)
        lengths = jnp.where(active, cache.lengths, slots.cache.lengths)  # it may be paused
        cache = cache._replace(lengths=lengths, pages=None)
        logits = _logits(decoder, params, hidden[:, 0], fixed.vocab)
        forced = _forced(slots.count - force_at, fixed.closing)
        token, logprob = sample(logits, keys, slots.count, fixed.sampling, forced)
        made = Made(jnp.where(active, token, NOTHING), logprob)
        token, count = jnp.where(active, token, slots.token), slots.count + active
        return (Slots(cache, token, count, slots.seed), active & ~jnp.isin(token, stops) & (count < stop_at)), made

    (slots, _), made = jax.lax.scan(step, (slots, slots.count < stop_at), length=fixed.steps)
    return slots, made


def _logits(decoder: Decoder, params: Params, hidden: Float[Array, "B D"], vocab: int) -> Float[Array, "B V"]:
    table = decoder.output_table(params)
    logits = jnp.einsum(
        "BD,VD->BV", hidden, table, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    logits = decoder.rules.constrain(logits, "batch", "vocab_in_use")  # else the table would be gathered, not they
    logits = decoder.rules.constrain(logits, "batch", None)
    return jnp.where(jnp.arange(len(table)) < vocab, logits, -jnp.inf) if vocab < len(table) else logits


def _forced(place: Int[Array, "B"], closing: tuple[int, ...]) -> Int[Array, "B"]:
    """The token of `closing` at each place, `NOTHING` before and behind it."""
    if not closing:
        return jnp.full_like(place, NOTHING)
    tokens = jnp.asarray(closing, jnp.int32)[jnp.clip(place, 0, len(closing) - 1)]
    return jnp.where((place >= 0) & (place < len(closing)), tokens, NOTHING)
