"""Hugging Face tensor names ↔ paths in our parameter tree: one table, read in both directions.

A layout such as "(N H) D -> D N H" names the axes of the stored tensor (torch's Linear keeps `[out, in]`, heads merged)
and those of our array, in the library's letters. Tensors of a layer, one a layer there, are stacked here on a leading
axis L that layouts leave out.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from dqjax.convert.classifier import ClassifierConfig
from dqjax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the axes of a stored tensor and of our array correspond.

    Attributes:
      there: axes of the stored tensor; each is a group of letters, outermost first.
      here: axes of our array, one letter each.
    """

    there: tuple[str, ...]
    here: str

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> "Layout":
        there, here = text.split("->")
        groups = re.findall(r"\(([^)]*)\)|(\S+)", there)
        return cls(tuple((merged or single).replace(" ", "") for merged, single in groups), here.replace(" ", ""))

    @property
    def _expanded(self) -> str:
        return "".join(self.there)

    def shape_there(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(math.prod(sizes[a] for a in group) for group in self.there)

    def shape_here(self, config: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(config)
        return tuple(sizes[a] for a in self.here)

    def take(self, stored: np.ndarray, index: Sequence[slice], config: ModelConfig) -> np.ndarray:
        """Copies the block `index` of our array out of the stored tensor, reading (of a mapped file) only its part."""
        sizes = axis_sizes(config)
        want = {a: slice(*s.indices(sizes[a])[:2]) for a, s in zip(self.here, index, strict=True)}
        rows, shape, within = [], [], []
        for outer, *inner in self.there:
            step = math.prod(sizes[a] for a in inner)
            rows.append(slice(want[outer].start * step, want[outer].stop * step))
            shape += [want[outer].stop - want[outer].start, *(sizes[a] for a in inner)]
            within += [slice(None), *(want[a] for a in inner)]
        block = stored[tuple(rows)].reshape(shape)[tuple(within)]
        # Always a copy: a view of the mapping would die (or change) with the file.
        return _compact(block.transpose([self._expanded.index(a) for a in self.here]))

    def restore(self, array: np.ndarray, config: ModelConfig) -> np.ndarray:
        """Our whole array in the stored form."""
        expanded = array.transpose([self.here.index(a) for a in self._expanded])
        return _compact(expanded).reshape(self.shape_there(config))


def _compact(view: np.ndarray) -> np.ndarray:
    """A row-major copy: of the bits, since numpy copies bfloat16 an element at a time, and in tiles that fit the cache."""
    out = np.empty(view.shape, view.dtype)
    source, target = (x.view(f"u{x.itemsize}") for x in (view, out))
    fast = int(np.argmin(view.strides))
    if fast == view.ndim - 1:
        target[...] = source
        return out
    before, between = (slice(None),) * fast, (slice(None),) * (view.ndim - fast - 2)
    for i in range(0, view.shape[fast], _TILE):
        for j in range(0, view.shape[-1], _TILE):
            tile = (*before, slice(i, i + _TILE), *between, slice(j, j + _TILE))
            target[tile] = source[tile]
    return out


_TILE = 256


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter that layouts use."""
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.mlp_size,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "C": len(config.labels) if isinstance(config, ClassifierConfig) else 0,
    }


When = Literal["always", "attention_bias", "qk_norm", "untied", "classifier"]

TABLE: tuple[tuple[str, str, str, When], ...] = (
    # stored name ({} is the layer), path here, layout, models that have it
    ("model.embed_tokens.weight", "embed.embedding", "V D -> V D", "always"),
    ("model.layers.{}.input_layernorm.weight", "layers.attention_norm.scale", "D -> D", "always"),
    ("model.layers.{}.self_attn.q_proj.weight", "layers.attention.q.kernel", "(N H) D -> D N H", "always"),
    ("model.layers.{}.self_attn.q_proj.bias", "layers.attention.q.bias", "(N H) -> N H", "attention_bias"),
    ("model.layers.{}.self_attn.q_norm.weight", "layers.attention.q_norm.scale", "H -> H", "qk_norm"),
    ("model.layers.{}.self_attn.k_proj.weight", "layers.attention.k.kernel", "(K H) D -> D K H", "always"),
    ("model.layers.{}.self_attn.k_proj.bias", "layers.attention.k.bias", "(K H) -> K H", "attention_bias"),
    ("model.layers.{}.self_attn.k_norm.weight", "layers.attention.k_norm.scale", "H -> H", "qk_norm"),
    ("model.layers.{}.self_attn.v_proj.weight", "layers.attention.v.kernel", "(K H) D -> D K H", "always"),
    ("model.layers.{}.self_attn.v_proj.bias", "layers.attention.v.bias", "(K H) -> K H", "attention_bias"),
    ("model.layers.{}.self_attn.o_proj.weight", "layers.attention.o.kernel", "D (N H) -> N H D", "always"),
    ("model.layers.{}.post_attention_layernorm.weight", "layers.mlp_norm.scale", "D -> D", "always"),
    ("model.layers.{}.mlp.gate_proj.weight", "layers.mlp.gate.kernel", "F D -> D F", "always"),
    ("model.layers.{}.mlp.up_proj.weight", "layers.mlp.up.kernel", "F D -> D F", "always"),
    ("model.layers.{}.mlp.down_proj.weight", "layers.mlp.down.kernel", "D F -> F D", "always"),
    ("model.norm.weight", "final_norm.scale", "D -> D", "always"),
    ("lm_head.weight", "head.kernel", "V D -> V D", "untied"),
    ("score.weight", "score.kernel", "C D -> C D", "classifier"),
)

IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Stored by old exports, though config.json determines it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the table for one model.

    Attributes:
      name: stored name, with {} for the layer where there is one.
      path: keys into our tree.
      layout: the axes of both.
      layers: L where our array is stacked over layers, else None.
    """

    name: str
    path: tuple[str, ...]
    layout: Layout
    layers: int | None

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The stored tensors of this entry, in order of layers."""
        return (self.name,) if self.layers is None else tuple(self.name.format(i) for i in range(self.layers))

    def shape_here(self, config: ModelConfig) -> tuple[int, ...]:
        """Shape of our array, the axis L included."""
        return (() if self.layers is None else (self.layers,)) + self.layout.shape_here(config)


def entries(config: ModelConfig) -> tuple[Entry, ...]:
    """The table's lines that a model of this config has."""
    has = {
        "always": True,
        "attention_bias": config.attention_bias,
        "qk_norm": config.qk_norm,
        "untied": not config.tie_embeddings,
        "classifier": isinstance(config, ClassifierConfig),
    }
    return tuple(
        Entry(name, tuple(path.split(".")), Layout.parse(layout), config.num_layers if "{}" in name else None)
        for name, path, layout, when in TABLE
        if has[when]
    )


def stored_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], Entry, int | None]]:
    """(stored name, stored shape, entry, layer) of every tensor of a model, in the order of the forward pass."""
    for stacked, lines in itertools.groupby(entries(config), lambda e: e.layers is not None):
        lines = list(lines)
        for layer in range(config.num_layers) if stacked else (None,):
            for entry in lines:
                yield entry.name.format(layer), entry.layout.shape_there(config), entry, layer
