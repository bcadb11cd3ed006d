"""objective: sft. Conversations, packed, into the cross-entropy of their answers."""

import logging
import pathlib

from dqjax.data.loader import open_training_data
from dqjax.load import Model, read_parameters
from dqjax.objectives.setup import Setup, measure, with_sample
from dqjax.sharding import Rules
from dqjax.steps.sft import make_sft_loss
from dqjax.train_config import Config
from dqjax.trainer import local_rows, placer

log = logging.getLogger(__name__)


def sft(config: Config, model: Model, rules: Rules, run: pathlib.Path) -> Setup:
    """Reads and packs the data; raises ConfigError for data that cannot be used."""
    rows = config.train.batch_rows
    data = open_training_data(
        config.data.model_copy(update={"quarantine": config.data.quarantine or str(run / "quarantine.jsonl")}),
        model.tokenizer,
        batch_rows=rows,
        local_rows=local_rows(rules, rows),
    )
    log.info("data: %s", "  ".join(f"{k} {v}" for k, v in data.counts.items()))
    stages = config.data.curriculum.stages if config.data.curriculum else ()
    labels = {"loss_by_source": data.sources, "loss_by_stage": [str(i) for i in range(len(stages))]}
    groups = {name.removeprefix("loss_by_"): len(names) for name, names in labels.items() if len(names) > 1}
    loss = make_sft_loss(model.decoder, rules, z_loss=config.objective.z_loss, groups=groups)
    evaluate = None
    if data.validation is not None:
        names = labels | {"loss_by_source": data.validation.documents.sources}
        evaluate = measure(loss, data.validation, placer(rules, rows), names)
        if config.train.sample_tokens:
            prompt = data.validation.documents.prompt(0).tolist()
            evaluate = with_sample(evaluate, model, prompt, config.train.sample_tokens, run / "samples.jsonl")
    epochs = config.train.epochs
    return Setup(
        trainable=model.decoder,
        initial=lambda: read_parameters(model),
        loss=loss,
        source=data.loader,
        steps=config.train.steps or (data.loader.batches_of(epochs) if epochs else data.loader.total_batches),
        labels=labels,
        evaluate=evaluate,
        close=data.loader.close,
    )
