"""A new student: random parameters of a named shape, with a tokenizer, as a Hugging Face folder to train from."""

import dataclasses
import json
import pathlib

import jax

from dqjax.config import ConfigError
from dqjax.convert.export import appearing
from dqjax.convert.huggingface import save_params, write_text
from dqjax.data.tokenizer import load_tokenizer
from dqjax.models.config import SIZES, ModelConfig, to_huggingface
from dqjax.models.decoder import Decoder
from dqjax.sharding import Rules, make_mesh

TABLE_MULTIPLE = 64  # the embedding gets a multiple of so many rows, so that it divides over a mesh


def new_student(size: str, tokenizer: pathlib.Path, folder: pathlib.Path, *, seed: int = 0) -> ModelConfig:
    """Writes the folder, float32, whole or not at all; the vocabulary follows the tokenizer.

    Args:
      size: a key of `models.config.SIZES`.
      tokenizer: a folder that `load_tokenizer` takes.
      seed: of the parameters.

    Raises:
      ConfigError: an unknown size, an unusable tokenizer, or `folder` is in use.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r}; one of {', '.join(SIZES)}")
    loaded = load_tokenizer(tokenizer)
    entries = max(loaded.get_vocab().values()) + 1
    config = dataclasses.replace(SIZES[size], vocab_size=-(-entries // TABLE_MULTIPLE) * TABLE_MULTIPLE)
    params = Decoder(config, Rules(make_mesh(devices=jax.devices()[:1]))).init(jax.random.key(seed))
    with appearing(folder) as building:
        save_params(params, config, building, dtype="float32")
        loaded.save_pretrained(building)
        write_text(building / "config.json", json.dumps(to_huggingface(config, dtype="float32"), indent=2) + "\n")
    return config
