"""Supervised fine-tuning: the next token of the teacher's chain."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from pydantic import Field

from dqjax.config import Section
from dqjax.losses.cross_entropy import cross_entropy
from dqjax.sharding import Rules
from dqjax.types import Batch, LanguageModel, Loss, Mean, Metrics, Params


class SFTConfig(Section):
    """objective: sft, the cross-entropy of the teacher's chains. z_loss: PaLM's weight on lse², for example 1e-4."""

    kind: Literal["sft"] = "sft"
    z_loss: float = Field(0.0, ge=0)


def make_sft_loss(
    model: LanguageModel, rules: Rules, *, z_loss: float = 0.0, groups: dict[str, int] | None = None
) -> Loss:
    """The cross-entropy of a packed batch: Σ token_weight · −log p(target).

    Args:
      groups: side arrays to break the loss down by, with their number of values (`{"source": 3, "stage": 2}`); the
        metric `loss_by_source` is then a vector of 3 means over trained tokens.
    """

    def loss(params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        total, logprob = cross_entropy(hidden, model.output_table(params), batch, rules, z_loss=z_loss)
        trained = (batch.token_weight > 0).astype(jnp.float32)
        metrics = {"loss": Mean(-jnp.sum(logprob * trained), jnp.sum(trained))}
        for name, size in (groups or {}).items():
            group = group_of_tokens(batch, name)
            sums = lambda x: jax.ops.segment_sum(x.reshape(-1), group.reshape(-1), size)  # noqa: B023, E731
            metrics[f"loss_by_{name}"] = Mean(-sums(logprob * trained), sums(trained))
        return total, metrics

    return loss


def group_of_tokens(batch: Batch, name: str) -> Int[Array, "B T"]:
    """The side value of each token's sequence; −1 for tokens of no sequence."""
    values = batch.side[name]
    return jnp.take_along_axis(values, batch.sequence_index, axis=1, mode="fill", fill_value=-1)
