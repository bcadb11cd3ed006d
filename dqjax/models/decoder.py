"""The decoder: Llama-, Qwen2- and Qwen3-shaped students as pure functions of their parameters.

    decoder = Decoder(config, rules, dtype=jnp.bfloat16)
    params = decoder.init(key)
    hidden, _ = decoder.apply(params, tokens, positions, segment_ids)      # [B, T, D]: training, layers scanned
    hidden, cache = decoder.apply(params, tokens, positions, segment_ids, cache)   # generation, layers unrolled
    w = decoder.output_table(params)                                       # [V, D], feeds kernels.linear_logprob

Parameters are a plain nested dict; those of the layers are stacked on a leading axis L::

    embed.embedding [V, D]
    layers.{attention_norm, mlp_norm}.scale [L, D]
    layers.attention.{q, k, v}.kernel [L, D, heads, H] (.bias [L, heads, H]), .o.kernel [L, N, H, D], .{q,k}_norm.scale [L, H]
    layers.mlp.{gate, up}.kernel [L, D, F], .down.kernel [L, F, D]
    final_norm.scale [D]
    head.kernel [V, D]                                                     # only where the tables are not tied
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dqjax.kernels.attention import api as attention_kernel
from dqjax.models.attention import Attention, Context, cached_plan
from dqjax.models.cache import Cache
from dqjax.models.config import ModelConfig
from dqjax.models.layers import GatedMLP, RMSNorm, rope_tables
from dqjax.sharding import Rules, shardings_of
from dqjax.types import Params

Remat = Literal["none", "attention", "dots", "full"]

REMAT_POLICIES = {
    # what the backward pass finds saved, from most memory to least
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig
    rules: Rules
    dtype: jnp.dtype
    attention_backend: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], context: Context, cache: tuple[Array, Array] | None = None):
        c = self.config
        x = self.rules.constrain(x, "batch", "length", None)
        attention = Attention(c, self.rules, self.dtype, self.attention_backend, name="attention")
        out, cache = attention(RMSNorm(c.norm_eps, self.dtype, name="attention_norm")(x), context, cache)
        x = x + out
        x = x + GatedMLP(c, self.dtype, name="mlp")(RMSNorm(c.norm_eps, self.dtype, name="mlp_norm")(x))
        return x, cache


class Network(nn.Module):
    """Embedding, L scanned layers, final norm; declares the output table too, so that `init` makes it."""

    config: ModelConfig
    rules: Rules
    dtype: jnp.dtype
    remat: Remat = "none"
    attention_backend: str | None = None

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], context: Context) -> Float[Array, "B T D"]:
        c = self.config
        x = Embedding(c, self.rules, self.dtype, name="embed")(tokens)
        layer = Layer
        if self.remat != "none":
            layer = nn.remat(Layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(c, self.rules, self.dtype, self.attention_backend, name="layers")(x, context)
        if not c.tie_embeddings:
            OutputTable(c, name="head")()
        return RMSNorm(c.norm_eps, self.dtype, name="final_norm")(x)


class Embedding(nn.Module):
    """Rows of the table `[V, D]`, gathered over fsdp first and split over tensor only."""

    config: ModelConfig
    rules: Rules
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "table"))
        table = self.param("embedding", init, (self.config.vocab_size, self.config.hidden_size), jnp.float32)
        table = self.rules.constrain(table.astype(self.dtype), "vocab_in_use", "table")
        return self.rules.constrain(table[tokens], "batch", "length", None)


class OutputTable(nn.Module):
    """The untied output table `[V, D]`."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        init = nn.with_partitioning(nn.initializers.normal(0.02), ("vocab", "table"))
        return self.param("kernel", init, (self.config.vocab_size, self.config.hidden_size), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model as pure functions.

    Attributes:
      config: shape and arithmetic.
      rules: mesh and logical axes.
      dtype: of activations and of weights in products; parameters stay float32.
      remat: what the backward pass recomputes: nothing ("none"), all but attention's outputs ("attention"), all but
        the products ("dots"), everything ("full").
      attention_backend: a backend of `kernels.attention`, or None for the one of the mesh's devices.
    """

    config: ModelConfig
    rules: Rules
    dtype: Any = jnp.float32
    remat: Remat = "none"
    attention_backend: str | None = None

    @property
    def _network(self) -> Network:
        return Network(self.config, self.rules, jnp.dtype(self.dtype), self.remat, self._backend)

    @property
    def _backend(self) -> str:
        """The attention backend: by the devices of the mesh, which need not be those of this process (`dqjax.plan`)."""
        if self.attention_backend:
            return self.attention_backend
        device = self.rules.mesh.devices.flat[0]
        return attention_kernel.packed_backend(device, jnp.dtype(self.dtype), self.config.head_dim)

    def _boxed(self, key: PRNGKeyArray) -> Any:
        tokens = jnp.zeros((self.rules.batch_shards, 8), jnp.int32)
        return self._network.init(key, tokens, self._context(tokens, tokens))["params"]

    def shapes(self) -> Any:
        """Parameter shapes and dtypes, without making any."""
        return nn.unbox(jax.eval_shape(self._boxed, jax.random.key(0)))

    def axis_names(self) -> Any:
        """Logical axis names of every parameter: the tree of `shapes` with tuples for leaves."""
        boxed = jax.eval_shape(self._boxed, jax.random.key(0))
        return jax.tree.map(lambda p: p.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))

    def shardings(self) -> Any:
        """NamedShardings of the parameters under the rules."""
        return shardings_of(self.rules, self.axis_names(), self.shapes())

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters (normal 0.02, norms 1, biases 0), made in place on the mesh; the same on every mesh."""
        return jax.jit(lambda k: nn.unbox(self._boxed(k)), out_shardings=self.shardings())(key)

    def unstack(self, params: Params) -> Params:
        """The parameters as many calls with a cache want them: in `dtype`, `layers` a tuple with one dict a layer.

        `apply` takes these and the stacked ones alike. In a loop, stacked float32 parameters would be sliced and cast
        anew at every step. On a single device the products of one input are joined, queries with keys and values and
        the MLP's gate with its other half: fewer and larger ones.
        """
        cast = jax.tree.map(lambda w: w.astype(self.dtype), params)
        layers = (_layer_of(cast, i) for i in range(self.config.num_layers))
        return {**cast, "layers": tuple(map(_joined, layers) if self.rules.mesh.size == 1 else layers)}

    def unstacked_shardings(self) -> Any:
        """Shardings of `unstack`'s result: split over tensor alone, since a step has no time to gather weights."""
        if self.rules.mesh.size == 1:
            return jax.tree.map(lambda _: self.rules.sharding(()), jax.eval_shape(self.unstack, self.shapes()))
        rules = dataclasses.replace(self.rules, table=(*self.rules.table, ("embed", ()), ("vocab", ("tensor",))))
        stacked = shardings_of(rules, self.axis_names(), self.shapes())
        whole = jax.tree.map(lambda s: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])), stacked["layers"])
        return {**stacked, "layers": (whole,) * self.config.num_layers}

    def _context(self, positions: Array, segment_ids: Array, **extra: Any) -> Context:
        return Context(*rope_tables(self.config, positions), positions, segment_ids, **extra)

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states, after the last norm.

        Args:
          tokens, positions, segment_ids: as in `types.Batch`; segment 0 is padding.
          cache: if given, positions are slots of it (each below its capacity), a row is one sequence, and the result
            attends to what is cached before.

        Returns:
          hidden `[B, T, D]` in `dtype`, and the cache with the new tokens.
        """
        if cache is None:
            plan = attention_kernel.make_plan(segment_ids, causal=True, backend=self._backend)
            context = self._context(positions, segment_ids, plan=plan)
            return self._network.apply({"params": params}, tokens, context), None
        valid = (segment_ids > 0).astype(jnp.int32)
        lengths = jnp.maximum(cache.lengths, jnp.max((positions + 1) * valid, axis=1))
        context = self._context(positions, segment_ids, lengths=lengths, pages=cache.pages)
        if tokens.shape[1] > 1:
            if cache.pages is not None:
                raise ValueError(f"a cache with pages takes a token of each row at a time, got {tokens.shape[1]}")
            context = context._replace(plan=cached_plan(context, cache.keys[0].shape[1], self._backend))
        c, dtype = self.config, jnp.dtype(self.dtype)
        x = Embedding(c, self.rules, dtype).apply({"params": params["embed"]}, tokens)
        layer = Layer(c, self.rules, dtype, self._backend)
        keys, values = [], []
        for i in range(c.num_layers):
            x, (k, v) = layer.apply({"params": _layer_of(params, i)}, x, context, (cache.keys[i], cache.values[i]))
            keys.append(k)
            values.append(v)
        x = RMSNorm(c.norm_eps, dtype).apply({"params": params["final_norm"]}, x)
        return x, Cache(tuple(keys), tuple(values), lengths, cache.pages)

    def output_table(self, params: Params) -> Float[Array, "V D"]:
        """The table whose product with a hidden state gives the logits, in `dtype`, split over tensor only."""
        table = params["embed"]["embedding"] if self.config.tie_embeddings else params["head"]["kernel"]
        return self.rules.constrain(table.astype(self.dtype), "vocab_in_use", "table")


def _layer_of(params: Params, i: int) -> Any:
    layers = params["layers"]
    return layers[i] if isinstance(layers, tuple) else jax.tree.map(lambda w: w[i], layers)


def _joined(layer: Params) -> Params:
    """A layer's parameters with q, k and v as "qkv", and gate and up as "gate_up", side by side in their outputs."""
    attention, mlp = dict(layer["attention"]), dict(layer["mlp"])
    attention["qkv"] = jax.tree.map(lambda *w: jnp.concatenate(w, -2), *(attention.pop(name) for name in "qkv"))
    mlp["gate_up"] = jax.tree.map(lambda *w: jnp.concatenate(w, -1), *(mlp.pop(name) for name in ("gate", "up")))
    return {**layer, "attention": attention, "mlp": mlp}
