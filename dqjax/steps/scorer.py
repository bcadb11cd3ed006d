"""Scorers: reasoning verbosity and cognitive difficulty, each of ten levels, from judge labels.

The head has 20 rows, ten for each name of `LABELS` in turn.
"""

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field

from dqjax.config import Section
from dqjax.losses.ordinal import expected_level, ordinal_loss, quadratic_weighted_kappa
from dqjax.losses.scores import sequence_scores
from dqjax.types import Batch, LanguageModel, Loss, Mean, Metrics, Params

LABELS = ("verbosity", "difficulty")
LEVELS = 10


class ScorerConfig(Section):
    """objective: RV and CD scorers on judge labels 0 … 9. The labels are the paper family's [S], the heads ours [D].

    smoothing: standard deviation, in levels, of the soft labels; 0 for hard ones. Judges disagree by about a level [D].
    """

    kind: Literal["scorer"] = "scorer"
    smoothing: float = Field(0.5, ge=0)


def make_scorer_loss(model: LanguageModel, *, smoothing: float = 0.5) -> Loss:
    """The sum over both labels of their mean soft-label cross-entropy, in nats.

    The batch needs the side arrays `verbosity`, `difficulty` and their weights (`losses.ordinal.weigh_labels`);
    `token_weight` plays no part. Metrics: those of `ordinal_loss`, named `<metric>_<label>`, and `loss`, the mean
    over all labels; the confusions are matrices that `summarise` turns into numbers.

    Args:
      model: its `output_table` has 20 rows (`models.heads.Classifier(decoder, labels=20)`).
    """

    def loss(params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        columns = batch.side[LABELS[0]].shape[1]
        logits = split_labels(sequence_scores(hidden, model.output_table(params), batch, columns))
        total, metrics = jnp.zeros(()), {}
        for name in LABELS:
            labels = batch.side[name].astype(jnp.float32)
            part, seen = ordinal_loss(logits[name], labels, batch.side[f"{name}_weight"], smoothing=smoothing)
            total += part
            metrics |= {f"{metric}_{name}": value for metric, value in seen.items()}
        metrics["loss"] = Mean(*(sum(parts) for parts in zip(*(metrics[f"loss_{name}"] for name in LABELS))))
        return total, metrics

    return loss


def split_labels(logits: Float[Array, "B S C"]) -> dict[str, Float[Array, "B S L"]]:
    """The logits of each label.

    Raises:
      ValueError: the head has not ten rows a label.
    """
    if logits.shape[-1] != LEVELS * len(LABELS):
        rows = LEVELS * len(LABELS)
        raise ValueError(f"a scorer's head has {rows} rows, ten for each of {LABELS}; got {logits.shape[-1]}")
    return dict(zip(LABELS, jnp.split(logits, len(LABELS), axis=-1)))


def expected_levels(logits: Float[Array, "B S C"]) -> dict[str, Float[Array, "B S"]]:
    """The level of each label, 0 … 9, from a scorer's 20 logits: what a reward or a selection reads."""
    return {name: expected_level(part) for name, part in split_labels(logits).items()}


def confusion_tables(metrics: Metrics) -> dict[str, str]:
    """Each label's confusion matrix as text: a row a label of the judge, a column a level of the scorer, counts."""
    tables = {}
    for name in LABELS:
        if (seen := metrics.get(f"confusion_{name}")) is not None:
            head = "judge" + "".join(f"{level:6}" for level in range(LEVELS))
            rows = (f"{i:5}" + "".join(f"{count:6.0f}" for count in row) for i, row in enumerate(np.asarray(seen.total)))
            tables[f"confusion_{name}"] = "\n".join((head, *rows))
    return tables


def summarise(metrics: Metrics) -> dict[str, float]:
    """Numbers that only whole sums give: each label's quadratic weighted kappa. On the host, once steps are merged."""
    seen = {name: metrics[f"confusion_{name}"] for name in LABELS if f"confusion_{name}" in metrics}
    return {f"kappa_{name}": quadratic_weighted_kappa(np.asarray(m.total)) for name, m in seen.items()}
