"""Models for the commands: from a folder or a size to a decoder, its parameters, its tokenizer and its chat format."""

import dataclasses
import logging
import os
import pathlib
import shutil
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dqjax.checkpoint import Checkpoints
from dqjax.config import ConfigError, Section
from dqjax.convert.adapters import adapter_run
from dqjax.convert.classifier import classifier_config
from dqjax.convert.huggingface import load_params
from dqjax.convert.source import ModelSource, resolve_model
from dqjax.data.chat import ChatFormat
from dqjax.data.tokenizer import load_tokenizer
from dqjax.models.config import ModelConfig
from dqjax.models.decoder import Decoder, Remat
from dqjax.models.heads import Classifier
from dqjax.models.lora import Adapters
from dqjax.sharding import Rules
from dqjax.types import Params

log = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16"]


class ModelSection(Section):
    """model: what is trained.

    init_from: a Hugging Face folder, a run folder, a converted checkpoint, or a hub name (`python -m dqjax.convert new`
    makes a fresh student); for reward models and scorers a classifier too, whose head is kept if it has as many labels.
    chat_template: keep the tokenizer's, or `think`, ours for Qwen2.5 students. dtype: of the arithmetic; parameters are
    float32. remat: what the backward pass recomputes, from fastest to smallest: none, dots, attention, full.
    attention_backend: null picks one.
    """

    init_from: str
    chat_template: Literal["keep", "think"] = "keep"
    dtype: DType = "bfloat16"
    remat: Remat = "full"
    attention_backend: str | None = None


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready for use, all but its parameters."""

    decoder: Decoder
    tokenizer: Any
    chat: ChatFormat
    source: ModelSource
    labels: tuple[str, ...] = ()  # of a classifier's head; the decoder is its trunk then

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def vocab(self) -> int:
        """Tokens that the tokenizer can decode: what may be sampled."""
        return max(self.tokenizer.get_vocab().values()) + 1


def build_model(section: ModelSection, rules: Rules) -> Model:
    """Config, tokenizer and decoder, without parameters yet; raises ConfigError before anything is compiled."""
    source = resolve_model(section.init_from)
    classifier = classifier_config(source)
    config = classifier or source.config()
    tokenizer = load_tokenizer(source.files, chat_template=section.chat_template, vocab_size=config.vocab_size)
    decoder = Decoder(config, rules, jnp.dtype(section.dtype), section.remat, section.attention_backend)
    return Model(decoder, tokenizer, ChatFormat.of(tokenizer), source, classifier.labels if classifier else ())


def load_model(name: str, rules: Rules, *, dtype: DType = "bfloat16", step: int | None = None) -> tuple[Model, Params]:
    """A trained model for generation and scoring: any folder that `resolve_model` knows.

    Args:
      step: of a run folder's checkpoint; by default the newest intact one.
    """
    model = build_model(ModelSection(init_from=str(name), dtype=dtype, remat="none"), rules)
    return model, read_parameters(model, step=step)


def read_parameters(model: Model, *, step: int | None = None, dtype: Any = jnp.float32) -> Params:
    """The parameters of a model's source, laid out over the mesh.

    Args:
      dtype: float32 to train; to compute with alone, `model.decoder.dtype` gives the same numbers in less memory.
    """
    if model.labels:
        raise ConfigError(
            f"{model.source.folder} holds a classifier ({len(model.labels)} labels); expected a language model"
        )
    return _read_language_model(model.source, model.decoder, step=step, dtype=dtype)


def _read_language_model(
    source: ModelSource, decoder: Decoder, *, step: int | None = None, dtype: Any = jnp.float32
) -> Params:
    if source.kind == "huggingface":
        return load_params(source.folder, decoder.config, decoder.shardings(), dtype=dtype)
    if (run := adapter_run(source)) is not None:
        whole = read_adapted(source, Adapters(decoder, run.config), _read_language_model(run.base, decoder), step=step)
        return jax.tree.map(lambda x: x.astype(dtype), whole)
    return restore_parameters(source, decoder, step=step, dtype=dtype)


def read_classifier(source: ModelSource, classifier: Classifier, *, step: int | None = None) -> Params:
    """Trunk and head of a classifier's folder, float32, laid out over the mesh."""
    if source.kind == "huggingface":
        return load_params(source.folder, classifier_config(source), classifier.shardings())
    if (run := adapter_run(source)) is None:
        return restore_parameters(source, classifier, step=step)
    return read_adapted(source, Adapters(classifier, run.config), read_trunk(run.base, classifier), step=step)


def read_trunk(source: ModelSource, classifier: Classifier) -> Params:
    """The parameters of a classifier's trunk from the folder of a language model, or of any classifier."""
    config = classifier_config(source)
    if config is None:
        params = _read_language_model(source, dataclasses.replace(classifier.decoder, config=source.config()))
    else:
        params = read_classifier(source, dataclasses.replace(classifier, labels=len(config.labels)))
    return {name: value for name, value in params.items() if name in classifier.trunk.shapes()}


def read_adapted(source: ModelSource, adapters: Adapters, base: Params, *, step: int | None = None) -> Params:
    """The base of a run that trained adapters, with those of its checkpoint added to the weights."""
    trained = restore_parameters(source, adapters, step=step)
    return jax.jit(adapters.merge, out_shardings=adapters.model.shardings())(base, trained)


def restore_parameters(
    source: ModelSource, trained: Any, *, step: int | None = None, dtype: Any = jnp.float32
) -> Params:
    """What a checkpoint of a run or converted folder holds, laid out over the mesh.

    Args:
      trained: has its `shapes` and `shardings`: a decoder, a classifier, adapters.
    """
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), trained.shapes())
    checkpoints = Checkpoints(source.folder / "checkpoints")
    found = checkpoints.restore({"params": abstract_tree(shapes, trained.shardings())}, step=step)
    checkpoints.close()
    if found is None:
        raise ConfigError(f"{source.folder} has no complete checkpoint yet")
    log.info("%s: step %d", source.folder, found[0])
    return found[1]["params"]


def abstract_tree(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs with shardings: what a checkpoint is restored into."""
    return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, shardings)


def write_model_files(model: Model, folder: pathlib.Path) -> None:
    """config.json, tokenizer and chat template, generation_config.json and the base's licence, for a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.tokenizer.save_pretrained(folder)
    for pattern in ("config.json", "generation_config.json", "LICENSE*", "README.md"):
        for path in model.source.files.glob(pattern):
            shutil.copyfile(path, folder / path.name)


def start_jax(compilation_cache: pathlib.Path | None = None) -> None:
    """Joins the other processes of the job, if the environment names them, and says what it runs on.

    Compiled programs are kept in `compilation_cache`, unless JAX_COMPILATION_CACHE_DIR names another folder: a run that is
    preempted compiles once, not at every start.

    Processes meet through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or through what jax finds by
    itself on a TPU pod or under SLURM with more than one task.
    """
    if os.environ.get("JAX_COORDINATOR_ADDRESS") and os.environ.get("JAX_NUM_PROCESSES"):
        jax.distributed.initialize(
            os.environ["JAX_COORDINATOR_ADDRESS"],
            int(os.environ["JAX_NUM_PROCESSES"]),
            int(os.environ["JAX_PROCESS_ID"]),
        )
    elif len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        jax.distributed.initialize()
    if compilation_cache is not None and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache.resolve()))
    devices = jax.devices()
    if devices[0].platform == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        log.warning("no accelerator found: running on the CPU (set JAX_PLATFORMS=cpu to say that this is meant)")
    log.info("%d × %s, %d process(es)", len(devices), devices[0].device_kind, jax.process_count())
