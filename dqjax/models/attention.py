"""Self-attention of a decoder layer: projections, per-head norms, RoPE, and the kernels of `dqjax.kernels`."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention import api as attention_kernel
from dqjax.kernels.decode_attention import api as decode_kernel
from dqjax.models.cache import write
from dqjax.models.config import ModelConfig
from dqjax.models.layers import Linear, RMSNorm, rotate
from dqjax.sharding import Rules


class Context(NamedTuple):
    """What every layer of one forward pass shares: computed once, broadcast through the layer scan."""

    cos: Float[Array, "B T h"]
    sin: Float[Array, "B T h"]
    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    lengths: Int[Array, "B"] | None = None  # with a cache: positions in use, the new tokens included
    pages: Int[Array, "B n"] | None = None  # of a cache that has some
    plan: Any = None  # the attention kernel's block plan


class Attention(nn.Module):
    """Grouped-query attention; with `cache` (keys, values), the new entries are written and the cache attended to."""

    config: ModelConfig
    rules: Rules
    dtype: jnp.dtype
    backend: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: tuple[Array, Array] | None = None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        c = self.config
        d, n, k, h = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        bias = 2 if c.attention_bias else 0
        if self.has_variable("params", "qkv"):  # as `Decoder.unstack` joins them
            shape, names = (d, n + 2 * k, h), ("embed", "heads", "head_dim")
            qkv = Linear("BTD,DNH->BTNH", shape, names, self.dtype, bias, name="qkv")(x)
            q, key, value = jnp.split(qkv, (n, n + k), axis=2)
        else:
            q = Linear("BTD,DNH->BTNH", (d, n, h), ("embed", "heads", "head_dim"), self.dtype, bias, name="q")(x)
            key = Linear("BTD,DKH->BTKH", (d, k, h), ("embed", "kv_heads", "head_dim"), self.dtype, bias, name="k")(x)
            value = Linear("BTD,DKH->BTKH", (d, k, h), ("embed", "kv_heads", "head_dim"), self.dtype, bias, name="v")(x)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, self.dtype, "head_dim", name="q_norm")(q)
            key = RMSNorm(c.norm_eps, self.dtype, "head_dim", name="k_norm")(key)
        q, key = rotate(q, context.cos, context.sin), rotate(key, context.cos, context.sin)
        if cache is None:
            out = _packed(q, key, value, context, self.rules, self.backend)
        else:
            valid = context.segment_ids > 0
            cache = (
                write(cache[0], key, context.positions, valid, context.pages),
                write(cache[1], value, context.positions, valid, context.pages),
            )
            out = _cached(q, *cache, context, self.rules, self.backend)
        return Linear("BTNH,NHD->BTD", (n, h, d), ("heads", "head_dim", "embed"), self.dtype, name="o")(out), cache


def _packed(q, k, v, context: Context, rules: Rules, backend: str | None) -> Float[Array, "B T N H"]:
    """Attention within each segment of a packed row."""

    def local(q, k, v, segment_ids, plan):
        # No positions: within a segment the order is that of the row, and blocks are skipped more tightly.
        return attention_kernel.attention(q, k, v, q_segment_ids=segment_ids, causal=True, backend=backend, plan=plan)

    return _per_shard(local, rules, q, k, v, (context.segment_ids, context.plan))


def _cached(q, keys, values, context: Context, rules: Rules, backend: str | None) -> Float[Array, "B T N H"]:
    """Attention of the T new tokens to everything cached, themselves included."""
    slots = keys.shape[1]

    def prefill(q, k, v, context):
        return attention_kernel.attention(
            q, k, v, **_cached_tokens(context, slots), causal=True, backend=backend, plan=context.plan
        )

    def decode(q, k, v, context):
        device = rules.mesh.devices.flat[0]  # need not be one of this process
        backend = decode_kernel.default_backend(device, k.dtype, k.shape[-1], slots)
        pages = context.pages
        if pages is not None and (axes := rules.spec(("batch",), pages.shape[:1])[0]):
            pages = pages - jax.lax.axis_index(axes) * len(k)  # numbered over all devices
        return decode_kernel.decode_attention(q[:, 0], k, v, context.lengths, pages=pages, backend=backend)[:, None]

    local = decode if q.shape[1] == 1 else prefill
    return _per_shard(local, rules, q, keys, values, (context,))


def cached_plan(context: Context, slots: int, backend: str) -> Any:
    """The plan of new tokens that attend to a cache of so many slots, for `Context.plan`."""
    return attention_kernel.make_plan(**_cached_tokens(context, slots), causal=True, backend=backend)


def _cached_tokens(context: Context, slots: int) -> dict[str, Array]:
    """The new tokens, and the slots in use, as attention's segments and positions."""
    return {
        "q_segment_ids": (context.segment_ids > 0).astype(jnp.int32),
        "kv_segment_ids": (jnp.arange(slots) < context.lengths[:, None]).astype(jnp.int32),
        "q_positions": context.positions,
    }


def _per_shard(local: Any, rules: Rules, q: Array, k: Array, v: Array, per_row: tuple) -> Array:
    """Runs `local(q, k, v, *per_row)` on each device's rows and heads, since a kernel is opaque to the partitioner.

    Query heads stay with their key-value head. Where the key-value heads do not divide over the tensor axis they are whole
    on every device, and a device takes the one head its query heads belong to; if they belong to several, heads are not
    split at all.
    """
    if rules.mesh.size == 1:
        return local(q, k, v, *per_row)
    q_spec = rules.spec(("batch", None, "heads", None), q.shape)
    kv_spec = rules.spec(("batch", None, "kv_heads", None), k.shape)
    row_spec = PartitionSpec(q_spec[0])
    pick = None
    if q_spec[2] is not None and kv_spec[2] is None:
        group, mine = q.shape[2] // k.shape[2], q.shape[2] // rules.mesh.shape[q_spec[2]]
        if group % mine:
            q_spec = PartitionSpec(q_spec[0], None, None, None)
        else:
            axis = q_spec[2]
            pick = lambda x: jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * mine // group, 1, 2)  # noqa: E731

    @functools.partial(
        jax.shard_map,
        mesh=rules.mesh,
        in_specs=(q_spec, kv_spec, kv_spec, *jax.tree.map(lambda _: row_spec, per_row)),
        out_specs=q_spec,
        check_vma=False,
    )
    def run(q, k, v, *per_row):
        return local(q, k if pick is None else pick(k), v if pick is None else pick(v), *per_row)

    return run(q, k, v, *per_row)
