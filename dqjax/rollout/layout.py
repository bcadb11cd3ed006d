"""How many sequences are decoded together, and how long they may get: the shapes that the engine's programs have.

Where the memory holds the longest answer for every slot, the cache is dense, a row of positions for each. Where it does
not, and decode attention is a kernel for TPU or Hopper, it is cut into pages, handed out as sequences grow: all slots
decode together as long as the pages last. Plain XLA would have to gather the keys of pages, a copy of the cache at every
step; there fewer slots have a row each.

Decode attention in plain XLA reads whole rows, however short the sequences are. There a large cache is as long as its
longest sequence needs, in steps of a quarter (`Layout.capacities`): it grows by a copy, and shrinks again once half of
it would do. The kernels read no further than a sequence is long.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from dqjax.kernels.decode_attention.api import default_backend
from dqjax.models.config import ModelConfig
from dqjax.sharding import Rules

LEAST_ROOM = 64
CHUNK = 256
PREFILL_TOKENS = 4096  # of one prefill call: enough for the products to be bound by arithmetic
LANE_SHARE = 8  # lanes take at most one part in so many of the slots' memory
PAGE = 256
"""Positions of a page: half of it is wasted behind each sequence, and a table entry read for so many."""

GROWS_FROM = {"cpu": 2**26, "gpu": 2**30}
"""Bytes of the slots' cache on a device from which reading less is worth compiling programs for several lengths."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes of the two caches.

    ::

        slots × capacity        sequences being decoded, prompt and answer; or pages × page, held by the slots
        lanes × room            prompts being prefilled, `chunk` tokens of each at a time

    Attributes:
      slots, lanes: multiples of the mesh's batch shards.
      capacities: positions of a slot, rising; the last holds `room` and the longest answer.
      room: positions of a lane, at least those of any prompt but its last token.
      page: positions of a page, of which a slot's capacity and a lane hold whole ones; None: each slot has a row.
      pages: how many, a multiple of the batch shards.
    """

    slots: int
    capacities: tuple[int, ...]
    lanes: int
    room: int
    chunk: int
    page: int | None = None
    pages: int = 0

    @property
    def positions(self) -> int:
        """Positions held by both caches at most."""
        held = self.slots * self.capacities[-1] if self.page is None else self.pages * self.page
        return held + self.lanes * self.room

    def capacity_for(self, positions: int, now: int) -> int:
        """The capacity to have where so many positions are needed: `now`, unless it is short or twice too long."""
        fitting = next((c for c in self.capacities if c >= positions), self.capacities[-1])
        return now if fitting <= now < 2 * fitting else fitting


def plan_layout(
    config: ModelConfig,
    rules: Rules,
    dtype: DTypeLike,
    *,
    rows: int,
    prompt_tokens: int,
    max_new_tokens: int,
    cache_bytes: int | None = None,
) -> Layout:
    """The layout for prompts of up to `prompt_tokens` tokens.

    Args:
      rows: the most slots, a multiple of the batch shards.
      cache_bytes: of a device, for both caches; where `rows` would not fit, there are pages, or fewer slots. None: no
        limit.

    Raises:
      ValueError: not even one slot a batch shard fits.
    """
    shards = rules.batch_shards
    room = max(LEAST_ROOM, 1 << (prompt_tokens - 2).bit_length() if prompt_tokens > 2 else 0)
    capacity = _rounded(room + max_new_tokens)
    chunk = min(room, CHUNK)
    per_position = position_bytes(config, rules, dtype)
    device = rules.mesh.devices.flat[0]
    reads_all = default_backend(device, dtype, config.head_dim, capacity) == "xla"
    grows_from = GROWS_FROM[device.platform] if reads_all else math.inf
    budget = math.inf if cache_bytes is None else cache_bytes // per_position * shards

    def with_slots(slots: int) -> Layout:
        lanes = min(PREFILL_TOKENS // chunk, slots, slots * capacity // (LANE_SHARE * room))
        grows = slots // shards * capacity * per_position >= grows_from
        capacities = _steps(room, capacity) if grows else (capacity,)
        return Layout(slots, capacities, max(lanes // shards, 1) * shards, room, chunk)

    if (layout := with_slots(rows)).positions <= budget:
        return layout
    if takes_pages(device, dtype, config.head_dim) and (layout := _paged(layout, shards, max_new_tokens, budget)):
        return layout
    for slots in range(rows, 0, -shards):
        if (layout := with_slots(slots)).positions <= budget:
            return layout
    raise ValueError(
        f"the cache of {shards} sequence(s) of {prompt_tokens} + {max_new_tokens} tokens takes "
        f"{with_slots(shards).positions // shards * per_position / 2**30:.2f} GiB a device, and its budget is "
        f"{cache_bytes / 2**30:.2f} GiB; raise the budget, or lower the limit of new tokens"
    )


def takes_pages(device: Any, dtype: DTypeLike, head_size: int) -> bool:
    """Whether decode attention on a device reads pages where they lie."""
    return default_backend(device, dtype, head_size, PAGE) != "xla"


def _paged(layout: Layout, shards: int, max_new_tokens: int, budget: int) -> Layout | None:
    """The layout with as many pages as fit in `budget` positions; None where they would not hold a longest sequence."""
    room = -(-layout.room // PAGE) * PAGE
    capacity = -(-(room + max_new_tokens) // PAGE) * PAGE
    lanes = max(min(layout.lanes, budget // (LANE_SHARE * room)) // shards, 1) * shards
    pages = (budget - lanes * room) // PAGE // shards * shards
    if pages // shards < capacity // PAGE:
        return None
    return Layout(min(layout.slots, pages), (capacity,), lanes, room, layout.chunk, PAGE, pages)


def _rounded(capacity: int) -> int:
    return capacity + -capacity % (64 if capacity < 1024 else 256)


def _steps(room: int, capacity: int) -> tuple[int, ...]:
    steps = [_rounded(room + 1)]
    while steps[-1] < capacity:
        steps.append(min(_rounded(steps[-1] * 5 // 4), capacity))
    return tuple(steps)


def position_bytes(config: ModelConfig, rules: Rules, dtype: DTypeLike) -> int:
    """Bytes of one cached position on a device: keys and values of all layers, of its share of the heads."""
    shape = (config.num_kv_heads, config.head_dim)
    heads, size = rules.sharding(("kv_heads", None), shape).shard_shape(shape)
    return 2 * config.num_layers * heads * size * jnp.dtype(dtype).itemsize
