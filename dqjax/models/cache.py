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
    """Keys and values of S slots a row; slot s of row b holds position s once s < lengths[b].

    Attributes:
      keys, values: one `[B, S, K, H]` array a layer.
      lengths: `[B]` int32, slots in use.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]


def make_cache(config: ModelConfig, rules: Rules, *, rows: int, capacity: int, dtype: DTypeLike) -> Cache:
    """An empty cache, split over batch and key-value heads as the rules say."""
    shape = (rows, capacity, config.num_kv_heads, config.head_dim)
    sharding = rules.sharding(("batch", None, "kv_heads", None), shape)
    layers = lambda: tuple(jnp.zeros(shape, dtype, device=sharding) for _ in range(config.num_layers))  # noqa: E731
    return Cache(layers(), layers(), jnp.zeros((rows,), jnp.int32, device=rules.sharding(("batch",), (rows,))))


def write(
    cache_layer: Float[Array, "B S K H"], new: Float[Array, "B T K H"], positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> Float[Array, "B S K H"]:
    """Puts the T new entries into their slots (slot = position); entries that are not valid are dropped."""
    outside = cache_layer.shape[1] + jnp.arange(new.shape[1])  # no two alike, so that no write waits for another
    slots = jnp.where(valid, positions, outside)
    rows = jnp.arange(cache_layer.shape[0])[:, None]
    return cache_layer.at[rows, slots].set(new.astype(cache_layer.dtype), mode="drop", unique_indices=True)
