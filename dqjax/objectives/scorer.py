"""objective: scorer. Conversations with judge labels into the ordinal loss of a trunk with twenty logits."""

import logging
import pathlib

from dqjax.data.label_loader import open_labelled_data
from dqjax.load import Model
from dqjax.models.heads import Classifier
from dqjax.objectives.reward import with_head
from dqjax.objectives.setup import Setup, measure, without_matrices
from dqjax.sharding import Rules
from dqjax.steps.scorer import LABELS, LEVELS, confusion_tables, make_scorer_loss, summarise
from dqjax.train_config import Config
from dqjax.trainer import local_rows, placer
from dqjax.types import Loss

log = logging.getLogger(__name__)


def scorer(config: Config, model: Model, rules: Rules, run: pathlib.Path) -> Setup:
    """Reads and packs the labelled conversations; raises ConfigError for data that cannot be used."""
    rows = config.train.batch_rows
    data = open_labelled_data(
        config.data.model_copy(update={"quarantine": config.data.quarantine or str(run / "quarantine.jsonl")}),
        model.tokenizer,
        batch_rows=rows,
        local_rows=local_rows(rules, rows),
    )
    log.info("data: %s", "  ".join(f"{k} {v}" for k, v in data.counts.items()))
    classifier = Classifier(model.decoder, labels=len(LABELS) * LEVELS)
    loss = make_scorer_loss(classifier, smoothing=config.objective.smoothing)
    evaluate = None
    if data.validation is not None:
        evaluate = measure(loss, data.validation, placer(rules, rows), {}, summarise, confusion_tables)
    return Setup(
        trainable=classifier,
        initial=lambda: with_head(classifier, model, config.train.seed),
        loss=_in_numbers(loss),
        source=data.loader,
        steps=config.train.steps or data.loader.batches_of(config.train.epochs),
        labels={},
        evaluate=evaluate,
        close=data.loader.close,
    )


def _in_numbers(loss: Loss) -> Loss:
    """The loss without its matrices, which the log of training has no place for."""

    def plain(params, frozen, batch, key):
        total, metrics = loss(params, frozen, batch, key)
        return total, without_matrices(metrics)

    return plain
