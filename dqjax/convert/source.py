"""What a model's name stands for: a run folder, a converted checkpoint, a Hugging Face folder, or a hub name.

    RUN/        config.yaml  model/  checkpoints/     "run": parameters of the newest intact checkpoint
    CONVERTED/               model/  checkpoints/     "converted": the same, made by `from-hf`, one checkpoint
    FOLDER/     config.json  *.safetensors            "huggingface"
    org/name                                          downloaded from the hub, then as "huggingface"

`model/` holds config.json, generation_config.json, the tokenizer's files and the base's LICENSE.
"""

import dataclasses
import os
import pathlib
import re
from typing import Literal

from dqjax.config import ConfigError
from dqjax.models.config import ModelConfig, read_config

Kind = Literal["run", "converted", "huggingface"]

# Weights as safetensors, configs, tokenizers, licence and card: never a pickle, never code.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A folder that holds a model.

    Attributes:
      kind: how its parameters are stored.
      folder: the folder itself.
      files: where config.json, the tokenizer and the licence lie.
    """

    kind: Kind
    folder: pathlib.Path
    files: pathlib.Path

    def config(self) -> ModelConfig:
        """The model's config; raises ConfigError naming the file."""
        try:
            return read_config(self.files)
        except ValueError as e:
            raise ConfigError(str(e)) from None


def resolve_model(name: str | os.PathLike) -> ModelSource:
    """Finds out what `name` is; train, generate, eval and convert all ask here.

    Raises:
      ConfigError: nothing is there, or a folder that holds no model.
    """
    folder = pathlib.Path(name).expanduser()
    if not folder.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
            raise ConfigError(f"no model at {name}: expected a run folder, a Hugging Face folder, or a hub name (org/name)")
        folder = download(str(name))
    if (folder / "model" / "config.json").is_file():
        return ModelSource("run" if (folder / "config.yaml").is_file() else "converted", folder, folder / "model")
    if (folder / "config.json").is_file():
        return ModelSource("huggingface", folder, folder)
    what = "a file" if folder.is_file() else "a folder without a model"
    hint = ""
    if folder.parent.name == "checkpoints":
        hint = f"; give the run folder, {folder.parent.parent}, and choose a checkpoint by its step"
    raise ConfigError(
        f"{folder} is {what}: expected config.json (Hugging Face), or model/ and checkpoints/ (a run folder){hint}"
    )


def download(name: str) -> pathlib.Path:
    """Fetches a model from the Hugging Face hub into its cache, or finds it there; raises ConfigError in one line."""
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as e:  # the hub's errors, the HTTP library's and the file system's have no common base
        raise ConfigError(
            f"no folder {name} here, and the hub did not give a model of that name ({str(e).strip().splitlines()[0]})"
        ) from None
