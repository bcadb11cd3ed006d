"""A decoder with a classification head: reward models (one label) and scorers (several).

    model = Classifier(decoder, labels=1)
    params = model.init(key)                                     # or {**trunk, "score": …} on a trained trunk
    hidden, _ = model.apply(params, tokens, positions, segment_ids)
    scores = hidden[last] @ model.output_table(params).T         # losses.scores.sequence_scores

To losses a classifier is a `types.LanguageModel` whose output table has one row a label. Parameters are the decoder's,
without a language-model head, and `score.kernel [C, D]`: the tensors of `Qwen2/Qwen3ForSequenceClassification`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dqjax.models.decoder import Decoder
from dqjax.sharding import shardings_of
from dqjax.types import Params


class ScoreHead(nn.Module):
    """The table `[C, D]` of a classification head, without a bias."""

    labels: int
    width: int
    scale: float

    @nn.compact
    def __call__(self) -> Float[Array, "C D"]:
        init = nn.with_partitioning(nn.initializers.normal(self.scale), (None, "table"))
        return self.param("kernel", init, (self.labels, self.width), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A trunk and a head as pure functions.

    Attributes:
      decoder: the trunk; an untied output table of its config is left out.
      labels: C, logits a sequence.
      scale: standard deviation of the head's entries at the start. Hidden states leave a norm with entries near 1, so
        scores start near scale · √D: with the default, within a few hundredths of 0, and every pair near p = 1/2.
    """

    decoder: Decoder
    labels: int
    scale: float = 1e-3

    @property
    def trunk(self) -> Decoder:
        """The decoder without a language-model head."""
        return dataclasses.replace(self.decoder, config=dataclasses.replace(self.decoder.config, tie_embeddings=True))

    @property
    def _head(self) -> ScoreHead:
        return ScoreHead(self.labels, self.decoder.config.hidden_size, self.scale)

    def _boxed_head(self, key: PRNGKeyArray) -> Any:
        return self._head.init(key)["params"]

    def init_head(self, key: PRNGKeyArray) -> Params:
        """A fresh head, for a trunk that is trained already."""
        return nn.unbox(self._boxed_head(key))

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters of trunk and head, in place on the mesh."""
        trunk, head = jax.random.split(key)
        score = jax.jit(self.init_head, out_shardings=self.shardings()["score"])(head)
        return {**self.trunk.init(trunk), "score": score}

    def shapes(self) -> Any:
        """Parameter shapes and dtypes, without making any."""
        return {**self.trunk.shapes(), "score": jax.eval_shape(self.init_head, jax.random.key(0))}

    def axis_names(self) -> Any:
        """Logical axis names of every parameter: the tree of `shapes` with tuples for leaves."""
        boxed = jax.eval_shape(self._boxed_head, jax.random.key(0))
        names = jax.tree.map(lambda p: p.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
        return {**self.trunk.axis_names(), "score": names}

    def shardings(self) -> Any:
        """NamedShardings of the parameters under the rules."""
        return shardings_of(self.decoder.rules, self.axis_names(), self.shapes())

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states; see `Decoder.apply`."""
        trunk = {name: value for name, value in params.items() if name != "score"}
        return self.trunk.apply(trunk, tokens, positions, segment_ids, cache)

    def output_table(self, params: Params) -> Float[Array, "C D"]:
        """The head's table, float32."""
        return params["score"]["kernel"]
