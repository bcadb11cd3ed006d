"""objective: distill. Conversations, packed, into divergences from the distributions of one or several teachers."""

import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dqjax.config import ConfigError
from dqjax.data.loader import TrainingData, open_training_data
from dqjax.data.rows import TokenValues
from dqjax.data.teacher_rows import TeacherRows
from dqjax.data.tokenizer import check_teacher_tokenizer
from dqjax.load import Model, ModelSection, build_model, read_parameters
from dqjax.objectives.on_policy import OnPolicy
from dqjax.objectives.setup import Evaluate, Setup, measure, with_sample
from dqjax.rollout.engine import Engine
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import Rules
from dqjax.steps.distill import CachedTeacher, OnPolicyConfig, make_distill_loss
from dqjax.steps.sft import make_sft_loss
from dqjax.train_config import Config
from dqjax.trainer import local_rows, own_rows, placer

log = logging.getLogger(__name__)


def distill(config: Config, model: Model, rules: Rules, run: pathlib.Path) -> Setup:
    """Reads and packs the data, opens the teachers; raises ConfigError for what cannot be used."""
    rows, objective = config.train.batch_rows, config.objective
    teachers: list = []
    models: list[Model] = []
    readers: list[TeacherRows] = []
    for i, teacher in enumerate(objective.teachers):
        if teacher.model is not None:
            models.append(open_teacher(teacher.model, config, model, rules))
            teachers.append(models[-1].decoder)
        else:
            cached = CachedTeacher(f"teacher_{i}_ids", f"teacher_{i}_logprobs", objective.tail)
            names = cached.ids, cached.logprobs
            readers.append(TeacherRows(teacher.cache, model.tokenizer, objective.temperature, names))
            teachers.append(cached)
    data = open_training_data(
        config.data.model_copy(update={"quarantine": config.data.quarantine or str(run / "quarantine.jsonl")}),
        model.tokenizer,
        batch_rows=rows,
        local_rows=None if objective.on_policy else local_rows(rules, rows),
        token_values=_joined(readers) if readers else None,
    )
    log.info("data: %s", "  ".join(f"{k} {v}" for k, v in data.counts.items()))
    for reader in readers:
        for sequences in data.row_sets:
            reader.check(sequences)
    loss = make_distill_loss(
        model.decoder,
        rules,
        teachers,
        weights=[teacher.weight for teacher in objective.teachers],
        beta=objective.divergence(),
        temperature=objective.temperature,
        hinton=objective.alpha if objective.loss == "hinton" else None,
        vocab=model.vocab,
    )
    evaluate = None
    if data.validation is not None:
        place = placer(rules, rows)
        if objective.on_policy:
            whole, place = place, lambda batch: whole(own_rows(rules, batch))
        divergence = measure(loss, data.validation, place, {})
        evaluate = _both(divergence, measure(make_sft_loss(model.decoder, rules), data.validation, place, {}))
        if config.train.sample_tokens:
            prompt = data.validation.documents.prompt(0).tolist()
            evaluate = with_sample(evaluate, model, prompt, config.train.sample_tokens, run / "samples.jsonl")
    epochs = config.train.epochs
    source = data.loader
    if objective.on_policy is not None:
        if config.data.too_long != "drop" or config.data.train_on_prompt:
            raise ConfigError(
                "objective.on_policy: answers are sampled whole; leave out data.too_long and data.train_on_prompt"
            )
        source = on_policy_source(objective.on_policy, data, model, rules, seed=config.train.seed)
    return Setup(
        trainable=model.decoder,
        initial=lambda: read_parameters(model),
        loss=loss,
        source=source,
        steps=config.train.steps or (data.loader.batches_of(epochs) if epochs else data.loader.total_batches),
        labels={},
        evaluate=evaluate,
        frozen={"teachers": tuple(read_parameters(teacher, dtype=teacher.decoder.dtype) for teacher in models)},
        close=data.loader.close,
    )


def on_policy_source(config: OnPolicyConfig, data: TrainingData, model: Model, rules: Rules, *, seed: int) -> OnPolicy:
    """The loader's batches, some answered by the student."""
    engine = Engine(
        model.decoder,
        stop_ids=model.chat.stop_ids,
        vocab=model.vocab,
        sampling=Sampling(temperature=config.temperature),
        rows=-(-config.decode_rows // rules.batch_shards) * rules.batch_shards,
        max_new_tokens=config.max_new_tokens,
        prompt_tokens=int(data.documents.answer_start.max()),
        seed=seed,
    )
    local = functools.partial(own_rows, rules)
    pad = model.tokenizer.pad_token_id
    return OnPolicy(data.loader, data.documents, engine, config.fraction, seed=seed, pad_id=pad, local=local)


def open_teacher(folder: str, config: Config, student: Model, rules: Rules) -> Model:
    """The teacher in a folder, to compute with as the student does; raises ConfigError if it speaks of other tokens."""
    section = ModelSection(
        init_from=folder, dtype=config.model.dtype, remat="none", attention_backend=config.model.attention_backend
    )
    teacher = build_model(section, rules)
    check_teacher_tokenizer(student.tokenizer, teacher.tokenizer, where=folder)
    return teacher


def _joined(readers: Sequence[TeacherRows]) -> TokenValues:
    """What all cached teachers say of a sample."""

    def values(id: str, tokens: np.ndarray, trained: np.ndarray) -> Mapping[str, np.ndarray]:
        return {name: array for reader in readers for name, array in reader(id, tokens, trained).items()}

    return values


def _both(divergence: Evaluate, cross_entropy: Evaluate) -> Evaluate:
    """The divergence, and beside it the cross-entropy of the texts, which compares with other objectives."""

    def evaluate(params, frozen):
        numbers, texts = divergence(params, frozen)
        return numbers | {"cross_entropy": cross_entropy(params, frozen)[0]["loss"]}, texts

    return evaluate
