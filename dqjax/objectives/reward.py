"""objective: reward. Pairs, packed, into the Bradley-Terry loss of a trunk with a scalar head."""

import logging
import pathlib

import jax

from dqjax.data.pair_loader import open_pair_data
from dqjax.load import Model, read_parameters
from dqjax.losses.bradley_terry import CALIBRATION_BINS
from dqjax.models.heads import Classifier
from dqjax.objectives.setup import Setup, measure
from dqjax.sharding import Rules
from dqjax.steps.reward import length_names, make_reward_loss, summarise
from dqjax.train_config import Config
from dqjax.trainer import local_rows, placer
from dqjax.types import Params

log = logging.getLogger(__name__)


def reward(config: Config, model: Model, rules: Rules, run: pathlib.Path) -> Setup:
    """Reads and packs the pairs; raises ConfigError for data that cannot be used."""
    rows, objective = config.train.batch_rows, config.objective
    data = open_pair_data(
        config.data.model_copy(update={"quarantine": config.data.quarantine or str(run / "quarantine.jsonl")}),
        model.tokenizer,
        batch_rows=rows,
        local_rows=local_rows(rules, rows),
        columns=("margin",) if objective.margin else (),
        whole=True,
    )
    log.info("data: %s", "  ".join(f"{k} {v}" for k, v in data.counts.items()))
    sources = data.pairs.sources
    bins = [f"{0.5 + 0.5 * (i + 0.5) / CALIBRATION_BINS:.3f}" for i in range(CALIBRATION_BINS)]
    labels = {
        "accuracy_by_length": length_names(objective.length_edges),
        "accuracy_by_source": sources,
        "calibration_confidence": bins,
        "calibration_accuracy": bins,
    }
    classifier = Classifier(model.decoder, labels=1)
    loss = make_reward_loss(
        classifier,
        centering=objective.centering,
        margin=objective.margin,
        length_edges=objective.length_edges,
        groups={"source": len(sources)} if len(sources) > 1 else None,
    )
    evaluate = None
    if data.validation is not None:
        evaluate = measure(loss, data.validation, placer(rules, rows), labels, summarise)
    return Setup(
        trainable=classifier,
        initial=lambda: with_fresh_head(classifier, model, config.train.seed),
        loss=loss,
        source=data.loader,
        steps=config.train.steps or data.loader.batches_of(config.train.epochs),
        labels=labels,
        evaluate=evaluate,
        close=data.loader.close,
    )


def with_fresh_head(classifier: Classifier, model: Model, seed: int) -> Params:
    """The trunk of a trained decoder and a new head; the decoder's own output table is left out."""
    trunk = classifier.trunk.shapes().keys()
    kept = {name: value for name, value in read_parameters(model).items() if name in trunk}
    head = jax.jit(classifier.init_head, out_shardings=classifier.shardings()["score"])(jax.random.key(seed))
    return {**kept, "score": head}
