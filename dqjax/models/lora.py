"""Low-rank adapters: a few trained numbers beside the frozen products of a decoder (https://arxiv.org/abs/2106.09685).

    y = x W + (alpha / rank) · (x A) B        A [in, rank], B [rank, out]; B starts at 0, so training starts at the base

Trained are A and B of each target, stacked over layers, and the head of a classifier; their tree has the base's paths::

    layers.attention.q.{lora_a [L, D, R], lora_b [L, R, N, H]}      score.kernel [C, D]
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray
from pydantic import Field

from dqjax.config import Section
from dqjax.models.decoder import Decoder
from dqjax.models.heads import Classifier
from dqjax.sharding import shardings_of
from dqjax.types import Params

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Product(NamedTuple):
    """Where a product's kernel lies in a layer, and how many of its leading dimensions are the input's."""

    path: tuple[str, str]
    inputs: int = 1


PRODUCTS: dict[str, Product] = {
    "q_proj": Product(("attention", "q")),
    "k_proj": Product(("attention", "k")),
    "v_proj": Product(("attention", "v")),
    "o_proj": Product(("attention", "o"), 2),
    "gate_proj": Product(("mlp", "gate")),
    "up_proj": Product(("mlp", "up")),
    "down_proj": Product(("mlp", "down")),
}


class LoRAConfig(Section):
    """lora: train low-rank adapters instead of the weights; the base stays as it is. Left out: all weights are trained.

    rank: of each adapter [D]. alpha: the adapters' product is scaled by alpha / rank [D]. targets: the products that get
    one, by their Hugging Face names; all by default [D].
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: tuple[Target, ...] = Field(tuple(PRODUCTS), min_length=1)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a model as pure functions.

    Attributes:
      model: the base; a classifier's head is trained whole.
    """

    model: Decoder | Classifier
    config: LoRAConfig

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.rank

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Parts of the model that are trained as they are, without adapters."""
        return ("score",) if isinstance(self.model, Classifier) else ()

    def _make(self, shapes: Any, names: Any) -> tuple[Any, Any]:
        """Shapes and axis names of the trained tree, from those of the base."""
        out: tuple[dict, dict] = {"layers": {}}, {"layers": {}}
        for target in self.config.targets:
            (group, name), inputs = PRODUCTS[target]
            kernel, axes = shapes["layers"][group][name]["kernel"].shape, names["layers"][group][name]["kernel"]
            split, rank = 1 + inputs, self.config.rank
            pair = {
                "lora_a": ((*kernel[:split], rank), (*axes[:split], None)),
                "lora_b": ((kernel[0], rank, *kernel[split:]), (axes[0], None, *axes[split:])),
            }
            for tree, place in zip(out, (0, 1)):
                tree["layers"].setdefault(group, {})[name] = {key: value[place] for key, value in pair.items()}
        out[0]["layers"] = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            out[0]["layers"],
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for part in self.trained_whole:
            out[0][part], out[1][part] = shapes[part], names[part]
        return out

    def shapes(self) -> Any:
        """Shapes and dtypes of the trained parameters."""
        return self._make(self.model.shapes(), self.model.axis_names())[0]

    def shardings(self) -> Any:
        """NamedShardings of the trained parameters: those of the dimensions they share with the base."""
        shapes, names = self._make(self.model.shapes(), self.model.axis_names())
        return shardings_of(self._rules, names, shapes)

    @property
    def _rules(self) -> Any:
        return self.model.decoder.rules if isinstance(self.model, Classifier) else self.model.rules

    def init(self, key: PRNGKeyArray, base: Params) -> Params:
        """A uniform in ±1/√in, as PEFT draws it, B zero; what is trained whole starts from the base."""
        shapes = self.shapes()

        def draw(path: tuple, s: jax.ShapeDtypeStruct) -> jax.Array:
            if path[-1].key == "lora_b":
                return jnp.zeros(s.shape, s.dtype)
            group, name = path[0].key, path[1].key
            (place,) = [i for i, product in enumerate(PRODUCTS.values()) if product.path == (group, name)]
            bound = 1 / math.sqrt(math.prod(s.shape[1:-1]))
            return jax.random.uniform(jax.random.fold_in(key, place), s.shape, s.dtype, -bound, bound)

        make = jax.jit(
            lambda: jax.tree_util.tree_map_with_path(draw, shapes["layers"]), out_shardings=self.shardings()["layers"]
        )
        whole = {part: jax.tree.map(lambda x: jnp.array(x, jnp.float32), base[part]) for part in self.trained_whole}
        return {"layers": make(), **whole}

    def join(self, base: Params, params: Params) -> Params:
        """The tree that `model.apply` takes: the base's, with the adapters beside their kernels, scaled."""
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, x: x * self.scale if path[-1].key == "lora_b" else x, params["layers"]
        )
        layers = dict(base["layers"])
        for group, products in scaled.items():
            layers[group] = layers[group] | {name: layers[group][name] | pair for name, pair in products.items()}
        return {**base, "layers": layers, **{part: params[part] for part in self.trained_whole}}

    def merge(self, base: Params, params: Params) -> Params:
        """The base with the adapters' products added to its kernels: a plain model that computes the same."""
        joined = self.join(base, params)
        layers = dict(joined["layers"])
        for group, products in params["layers"].items():
            layers[group] = layers[group] | {name: _merged(layers[group][name]) for name in products}
        return {**joined, "layers": layers}


def _merged(product: Params) -> Params:
    a, b, kernel = product["lora_a"], product["lora_b"], product["kernel"]
    L, rank = a.shape[0], a.shape[-1]
    flat = a.reshape(L, -1, rank), b.reshape(L, rank, -1)
    low = jnp.einsum("LIR,LRO->LIO", *flat, precision=jax.lax.Precision.HIGHEST)
    rest = {name: value for name, value in product.items() if name not in ("lora_a", "lora_b")}
    return rest | {"kernel": kernel + low.reshape(kernel.shape).astype(kernel.dtype)}
