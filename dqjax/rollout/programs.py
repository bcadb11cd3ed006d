"""The three programs of the engine, all of fixed shapes: prefill a chunk, admit to slots, decode some steps.

::

    prompts --prefill--> lanes [R, room] --admit--> slots [B, capacity] --decode--> tokens [N, B]

A lane holds a prompt but its last token. That token is the first one a slot is fed, so that decoding alone samples, and a
prompt that a group shares is prefilled once and its lane copied to as many slots as it has samples.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from dqjax.models.cache import Cache, make_cache
from dqjax.models.decoder import Decoder
from dqjax.rollout.sampling import Sampling, sample
from dqjax.types import Params

NO_BUDGET = 2**31 - 1
NOTHING = -1  # in place of a token that a slot without a sample did not make


class Slots(NamedTuple):
    """B sequences being decoded.

    Attributes:
      cache: `lengths` are the positions of the tokens fed next.
      token: fed next. count: tokens made so far. seed: of the sample.
      budget: tokens after which thinking is ended, `NO_BUDGET` for none. closed: it has ended.
      recent: the last tokens made, as many as the closing tag has.
    """

    cache: Cache
    token: Int[Array, "B"]
    count: Int[Array, "B"]
    seed: UInt[Array, "B"]
    budget: Int[Array, "B"]
    closed: Bool[Array, "B"]
    recent: Int[Array, "B F"]


class Admission(NamedTuple):
    """Which lane is copied to which slot; a slot past the last one is no entry.

    `length` are the tokens of the lane, `token` the last one of the prompt.
    """

    slot: Int[Array, "A"]
    lane: Int[Array, "A"]
    length: Int[Array, "A"]
    token: Int[Array, "A"]
    seed: UInt[Array, "A"]
    budget: Int[Array, "A"]


class Made(NamedTuple):
    """What N steps made: tokens (`NOTHING` where a slot was idle), their log-probabilities, and which were forced."""

    tokens: Int[Array, "N B"]
    logprobs: Float[Array, "N B"]
    forced: Bool[Array, "N B"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is fixed of decoding.

    Attributes:
      stop_ids: tokens that end a sample.
      think_end: tokens that end thinking, forced at a sample's budget.
      vocab: real entries of the output table; padded ones are never sampled.
      limit: tokens of a sample.
      steps: of one call.
      seed: of the engine; a sample's own seed is folded into it.
    """

    sampling: Sampling
    stop_ids: tuple[int, ...]
    think_end: tuple[int, ...]
    vocab: int
    limit: int
    steps: int
    seed: int


def prefill(
    decoder: Decoder, params: Params, lanes: Cache, tokens: Int[Array, "R C"], starts: Int[Array, "R"], counts: Int[Array, "R"]
) -> Cache:
    """Caches the next chunk of each lane: `counts[r]` tokens from position `starts[r]` on."""
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    segments = (place < counts[:, None]).astype(jnp.int32)
    return decoder.apply(params, tokens, starts[:, None] + place, segments, lanes._replace(lengths=starts))[1]


def make_slots(decoder: Decoder, *, slots: int, capacity: int, tag: int) -> Slots:
    """Slots without samples; `tag` is the number of tokens of the closing tag."""

    def full(value, dtype, *more):
        shape, names = (slots, *more), ("batch", *(None for _ in more))
        return jnp.full(shape, value, dtype, device=decoder.rules.sharding(names, shape))

    return Slots(
        make_cache(decoder.config, decoder.rules, rows=slots, capacity=capacity, dtype=decoder.dtype),
        token=full(0, jnp.int32),
        count=full(0, jnp.int32),
        seed=full(0, jnp.uint32),
        budget=full(NO_BUDGET, jnp.int32),
        closed=full(False, jnp.bool),
        recent=full(NOTHING, jnp.int32, tag),
    )


def admit(slots: Slots, lanes: Cache, entry: Admission) -> Slots:
    """Starts samples: copies lanes to slots and resets what the slots held."""

    def copy(of_slots, of_lanes):
        rows = of_lanes[entry.lane]
        return of_slots.at[entry.slot, : of_lanes.shape[1]].set(rows, mode="drop", unique_indices=True)

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
        put(slots.budget, entry.budget),
        put(slots.closed, False),
        put(slots.recent, NOTHING),
    )


def decode(
    decoder: Decoder, fixed: Decoding, params: Params, slots: Slots, active: Bool[Array, "B"]
) -> tuple[Slots, Made]:
    """Makes up to `fixed.steps` tokens of each active slot; one that stops idles for the rest.

    Args:
      params: as `Decoder.unstack` gives them.
      active: slots that hold an unfinished sample.
    """
    stops = jnp.asarray(fixed.stop_ids, jnp.int32)
    base = jax.random.key(fixed.seed)
    keys = jax.vmap(lambda seed: jax.random.fold_in(base, seed))(slots.seed)

    def step(carry, _):
        slots, active = carry
        cache = slots.cache._replace(lengths=jnp.where(active, slots.cache.lengths, 0))  # an idle slot has nothing to read
        positions, segments = cache.lengths[:, None], active[:, None].astype(jnp.int32)
        hidden, cache = decoder.apply(params, slots.token[:, None], positions, segments, cache)
        logits = _logits(decoder, params, hidden[:, 0], fixed.vocab)
        forced = _forced(slots, fixed.think_end)
        token, logprob = sample(logits, keys, slots.count, fixed.sampling, forced)
        made = Made(jnp.where(active, token, NOTHING), logprob, active & (forced >= 0))
        recent = jnp.concatenate([slots.recent, token[:, None]], axis=1)[:, 1:]
        slots = slots._replace(
            cache=cache,
            token=token,
            count=slots.count + active,
            closed=slots.closed | jnp.all(recent == jnp.asarray(fixed.think_end, jnp.int32), axis=1),
            recent=recent,
        )
        return (slots, active & ~jnp.isin(token, stops) & (slots.count < fixed.limit)), made

    (slots, _), made = jax.lax.scan(step, (slots, active), length=fixed.steps)
    return slots, made


def _logits(decoder: Decoder, params: Params, hidden: Float[Array, "B D"], vocab: int) -> Float[Array, "B V"]:
    table = decoder.output_table(params)
    logits = jnp.einsum("BD,VD->BV", hidden, table, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST)
    logits = decoder.rules.constrain(logits, "batch", None)
    return jnp.where(jnp.arange(len(table)) < vocab, logits, -jnp.inf) if vocab < len(table) else logits


def _forced(slots: Slots, think_end: tuple[int, ...]) -> Int[Array, "B"]:
    """The token of the closing tag that is due, `NOTHING` where none is: the budget is not reached, or thinking is over."""
    if not think_end:
        return jnp.full_like(slots.token, NOTHING)
    place = slots.count - slots.budget
    due = ~slots.closed & (place >= 0) & (place < len(think_end))
    return jnp.where(due, jnp.asarray(think_end, jnp.int32)[jnp.clip(place, 0, len(think_end) - 1)], NOTHING)
