"""Reward models: a scalar a sequence, trained on pairs by Bradley and Terry."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field, model_validator

from dqjax.config import Section
from dqjax.losses.bradley_terry import bradley_terry_loss, expected_calibration_error, mean_by_group
from dqjax.losses.pairs import pairs_of
from dqjax.losses.reduce import sequence_sums
from dqjax.losses.scores import sequence_scores
from dqjax.types import Batch, LanguageModel, Loss, Metrics, Params


class RewardConfig(Section):
    """objective: Bradley-Terry reward training, the loss of the paper family's reward models [P].

    centering: c of c · mean((r_c + r_r)²), which keeps scores near 0; off [D].
    margin: read the pairs' `margin` column: a preferred answer must win by that much; off [D].
    length_edges: tokens; borders of the classes of (chosen − rejected) length for `accuracy_by_length`, a check that
      the model does not simply prefer long answers [D].
    """

    kind: Literal["reward"] = "reward"
    centering: float = Field(0.0, ge=0)
    margin: bool = False
    length_edges: tuple[int, ...] = (-256, -32, 32, 256)

    @model_validator(mode="after")
    def _edges_rise(self):
        if any(a >= b for a, b in zip(self.length_edges, self.length_edges[1:])):
            raise ValueError(f"length_edges: expected rising numbers of tokens, got {list(self.length_edges)}")
        return self


def make_reward_loss(
    model: LanguageModel,
    *,
    centering: float = 0.0,
    margin: bool = False,
    length_edges: Sequence[int] = (),
    groups: dict[str, int] | None = None,
) -> Loss:
    """The Bradley-Terry loss of a packed batch of pairs.

    The batch needs the side arrays of `losses.pairs` (weights by `weigh_pairs`), and `margin` where that is asked for;
    `token_weight` plays no part. The metrics are those of `bradley_terry_loss`, `accuracy_by_length` with edges, and
    `accuracy_by_<name>` for each group: vectors.

    Args:
      model: its `output_table` has one row (`models.heads.Classifier(decoder, labels=1)`).
      length_edges: rising borders, in tokens, of classes of length difference.
      groups: side arrays to break the accuracy down by, with their number of values (`{"source": 3}`).
    """
    edges = jnp.asarray(tuple(length_edges), jnp.float32)

    def loss(params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        columns = batch.side["pair_id"].shape[1]
        scores = sequence_scores(hidden, model.output_table(params), batch, columns)[:, :, 0]
        pairs = pairs_of(batch)
        total, metrics = bradley_terry_loss(
            scores, pairs, margin=batch.side["margin"] if margin else None, centering=centering
        )
        chosen, rejected = pairs.split(jax.lax.stop_gradient(scores))
        right = (chosen > rejected).astype(jnp.float32)
        if edges.size:
            real = (batch.segment_ids > 0).astype(jnp.float32)
            longer, shorter = pairs.split(sequence_sums(real, batch.sequence_index, columns))
            kind = jnp.searchsorted(edges, longer - shorter, side="right")
            metrics["accuracy_by_length"] = mean_by_group(right, kind, edges.size + 1, pairs)
        for name, size in (groups or {}).items():
            metrics[f"accuracy_by_{name}"] = mean_by_group(right, batch.side[name], size, pairs)
        return total, metrics

    return loss


def length_names(edges: Sequence[int]) -> tuple[str, ...]:
    """Labels of the classes of `accuracy_by_length`: `below_-32`, `-32_to_32` (half open), `from_32`."""
    return (f"below_{edges[0]}", *(f"{a}_to_{b}" for a, b in zip(edges, edges[1:])), f"from_{edges[-1]}")


def summarise(metrics: Metrics) -> dict[str, float]:
    """Numbers that only whole sums give: the expected calibration error. On the host, once steps are merged."""
    if "calibration_confidence" not in metrics:
        return {}
    error = expected_calibration_error(metrics["calibration_confidence"], metrics["calibration_accuracy"])
    return {"calibration_error": error}
