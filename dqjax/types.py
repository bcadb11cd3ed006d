"""The values that cross layer borders: parameters, batches, metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

Params = Mapping[str, Any]
"""A nested dict of arrays, as a model's `init` returns it; per-layer arrays are stacked on a leading axis L."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A global batch of packed rows.

    A row of T tokens holds several sequences end to end, each with its own segment id::

        tokens         a a a a b b b c c 0      sequence a, b, c, then padding
        segment_ids    1 1 1 1 2 2 2 3 3 0      0 marks padding; ids rise along the row
        positions      0 1 2 3 0 1 2 0 1 0      restart with each sequence
        targets        a a a . b b . c . .      the next token of the same sequence
        token_weight   0 w w 0 0 w 0 w 0 0      0 where there is nothing to learn
        sequence_index 0 0 0 0 1 1 1 2 2 S      column in the side arrays (S: none, out of range)

    `token_weight` carries the whole reduction: it is computed once over the *global* batch (1/N for a mean over all
    N trained tokens), so every loss is a plain weighted sum and does not change with micro-batching, packing or the
    mesh. `side` holds one value a sequence, `[B, S]`: the host's `row` number, the `source`, an advantage, a β.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    token_weight: Float[Array, "B T"]
    sequence_index: Int[Array, "B T"]
    side: Mapping[str, Array] = dataclasses.field(default_factory=dict)


class Mean(NamedTuple):
    """A metric that adds up: `total / count` once all micro-batches, devices and steps are summed."""

    total: Float[Array, "..."] | float
    count: Float[Array, "..."] | float


class Max(NamedTuple):
    """A metric of which the largest value counts, over micro-batches, devices and steps."""

    value: Float[Array, "..."] | float


Metrics = Mapping[str, Mean | Max]


def merge_metrics(a: Metrics, b: Metrics) -> Metrics:
    """Joins two dicts of metrics; a name in both is summed (`Mean`) or maximised (`Max`)."""

    def join(x, y):
        if isinstance(x, Max):
            return Max(jnp.maximum(x.value, y.value))
        return Mean(x.total + y.total, x.count + y.count)

    return {**a, **b, **{name: join(a[name], b[name]) for name in a.keys() & b.keys()}}


@runtime_checkable
class LanguageModel(Protocol):
    """What losses and rollouts need of a model: pure functions of its parameters (`models.Decoder` is one)."""

    def apply(self, params: Params, tokens: Array, positions: Array, segment_ids: Array, cache: Any = None) -> tuple[Array, Any]:
        """Final hidden states `[B, T, D]` and the cache, if one was given."""

    def output_table(self, params: Params) -> Array:
        """The table `[V, D]` whose product with a hidden state gives the logits."""


@runtime_checkable
class Loss(Protocol):
    """A training objective: a weighted sum over one micro-batch, and metrics that add up over micro-batches."""

    def __call__(self, params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Array, Metrics]: ...


@runtime_checkable
class Source(Protocol):
    """Where batches come from. `next` gets the current parameters, since a rollout samples from them.

    The whole state is what `get_state` returns (JSON values); after `set_state` the same batches follow, on any number of
    hosts. It is None where the source could not go on from here, but will be able to some steps later. `next` raises
    `StopIteration` at the end.
    """

    def next(self, state: Any, frozen: Any) -> Batch: ...

    def get_state(self) -> dict | None: ...

    def set_state(self, state: dict) -> None: ...
