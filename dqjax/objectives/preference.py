"""objective: preference. Pairs, packed, into DPO or CogPO against the starting weights, or what they said."""

import logging
import pathlib

from dqjax.data.pair_loader import open_pair_data
from dqjax.load import Model, read_parameters
from dqjax.objectives.reference import cached_reference
from dqjax.objectives.setup import Setup, measure, with_sample
from dqjax.sharding import Rules
from dqjax.steps.preference import make_preference_loss
from dqjax.train_config import Config
from dqjax.trainer import local_rows, placer

log = logging.getLogger(__name__)


def preference(config: Config, model: Model, rules: Rules, run: pathlib.Path) -> Setup:
    """Reads and packs the pairs; raises ConfigError for data that cannot be used."""
    rows, objective = config.train.batch_rows, config.objective
    frozen = objective.reference == "frozen"
    cogpo = objective.loss == "cogpo"
    data = open_pair_data(
        config.data.model_copy(update={"quarantine": config.data.quarantine or str(run / "quarantine.jsonl")}),
        model.tokenizer,
        batch_rows=rows,
        local_rows=local_rows(rules, rows),
        columns=("beta",) if cogpo else (),
        sequence_values=None
        if frozen
        else cached_reference(model, rules, run / "reference", rows=rows, row_length=config.data.row_length),
    )
    log.info("data: %s", "  ".join(f"{k} {v}" for k, v in data.counts.items()))
    sources = data.pairs.sources
    labels = {"accuracy_by_source": sources}
    loss = make_preference_loss(
        model.decoder,
        rules,
        beta=None if cogpo else objective.beta,
        length_normalised=objective.length_normalised,
        reference=objective.reference,
        vocab=model.vocab,
        groups={"source": len(sources)} if len(sources) > 1 else None,
    )
    evaluate = None
    if data.validation is not None:
        names = {"accuracy_by_source": data.validation.pairs.sources}
        evaluate = measure(loss, data.validation, placer(rules, rows), names)
        if config.train.sample_tokens:
            prompt = data.validation.pairs.prompt(0).tolist()
            evaluate = with_sample(evaluate, model, prompt, config.train.sample_tokens, run / "samples.jsonl")
    return Setup(
        trainable=model.decoder,
        initial=lambda: read_parameters(model),
        loss=loss,
        source=data.loader,
        steps=config.train.steps or data.loader.batches_of(config.train.epochs),
        labels=labels,
        evaluate=evaluate,
        # read apart: the trained copy is donated to the first step
        frozen={"reference": read_parameters(model, dtype=model.decoder.dtype)} if frozen else None,
        close=data.loader.close,
    )
