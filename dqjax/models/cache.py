"""The key-value cache: an explicit pytree, a tuple over layers, argument and result of `Decoder.apply`.

It does not go through the layer scan: compiled for TPU, a scanned cache costs a second whole cache of temporaries, a tuple
of donated layers costs none.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dqjax.models.config import ModelConfig
from dqjax.sharding import Rules


class Cache(NamedTuple):
    """Keys and values of B sequences: a row of S slots each, or pages of S slots that a table hands out.

    Position p of sequence b lies in slot p of row b, or in slot p % S of page `pages[b, p // S]`, once p < lengths[b].

    Attributes:
      keys, values: one `[B, S, K, H]` array a layer, or `[P, S, K, H]` of pages.
      lengths: `[B]` int32, positions in use.
      pages: of each sequence, for a new token at a time; numbers behind those in use mean nothing.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Int[Array, "B"]
    pages: Int[Array, "B n"] | None = None

    @property
    def capacity(self) -> int:
        """Positions that there is room for in a sequence."""
        return self.keys[0].shape[1] * (1 if self.pages is None else self.pages.shape[1])


def make_cache(config: ModelConfig, rules: Rules, *, rows: int, capacity: int, dtype: DTypeLike) -> Cache:
    """An empty cache, split over batch and key-value heads as the rules say."""
    shape = (rows, capacity, config.num_kv_heads, config.head_dim)
    sharding = rules.sharding(("batch", None, "kv_heads", None), shape)
    layers = lambda: tuple(jnp.zeros(shape, dtype, device=sharding) for _ in range(config.num_layers))  # noqa: E731
    return Cache(layers(), layers(), jnp.zeros((rows,), jnp.int32, device=rules.sharding(("batch",), (rows,))))


def write(
    cache_layer: Float[Array, "P S K H"],
    new: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    pages: Int[Array, "B n"] | None = None,
) -> Float[Array, "P S K H"]:
    """Puts the T new entries into their slots; entries that are not valid are dropped. `pages` as in `Cache`."""
    (P, S), (B, T) = cache_layer.shape[:2], positions.shape
    if pages is None:
        rows, slots = jnp.arange(B)[:, None], jnp.where(valid, positions, S + jnp.arange(T))
    else:
        rows, slots = jnp.take_along_axis(pages, positions // S, axis=1, mode="clip"), positions % S
        rows = jnp.where(valid, rows, P + jnp.arange(B * T).reshape(B, T))
    # No two places are alike, those outside included, so that no write waits for another.
    return cache_layer.at[rows, slots].set(new.astype(cache_layer.dtype), mode="drop", unique_indices=True)
