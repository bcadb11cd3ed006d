"""objective: reward. Pairs, packed, into the Bradley-Terry loss of a trunk with a scalar head."""

import importlib.util
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dqjax.data.pair_loader import open_pair_data
from dqjax.eval.plots import draw_reliability
from dqjax.load import Model, read_classifier, read_trunk
from dqjax.losses.bradley_terry import CALIBRATION_BINS
from dqjax.models.heads import Classifier
from dqjax.objectives.setup import Evaluate, Setup, measure
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
        names = labels | {"accuracy_by_source": data.validation.pairs.sources}
        evaluate = measure(loss, data.validation, placer(rules, rows), names, summarise)
        evaluate = _with_diagram(evaluate, bins, run / "reliability.png")
    return Setup(
        trainable=classifier,
        initial=lambda: with_head(classifier, model, config.train.seed),
        loss=loss,
        source=data.loader,
        steps=config.train.steps or data.loader.batches_of(config.train.epochs),
        labels=labels,
        evaluate=evaluate,
        close=data.loader.close,
    )


def _with_diagram(evaluate: Evaluate, bins: Sequence[str], file: pathlib.Path) -> Evaluate:
    """`evaluate`, and its reliability diagram in `file`, where matplotlib is installed."""

    def both(params: Params, frozen: Any) -> tuple[dict[str, float], dict[str, str]]:
        numbers, texts = evaluate(params, frozen)
        if jax.process_index() == 0 and importlib.util.find_spec("matplotlib"):
            seen = [b for b in bins if f"calibration_accuracy/{b}" in numbers]
            confidence, accuracy = ([numbers[f"calibration_{of}/{b}"] for b in seen] for of in ("confidence", "accuracy"))
            draw_reliability(file, confidence, accuracy)
        return numbers, texts

    return both


def with_head(classifier: Classifier, model: Model, seed: int) -> Params:
    """The trunk of a trained decoder and a new head; of a classifier with as many labels, its own head."""
    if len(model.labels) == classifier.labels:
        return read_classifier(model.source, classifier)
    head = jax.jit(classifier.init_head, out_shardings=classifier.shardings()["score"])(jax.random.key(seed))
    return {**read_trunk(model.source, classifier), "score": head}
