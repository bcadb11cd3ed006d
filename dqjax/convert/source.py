"""What a model argument points to: a Hugging Face folder, a run folder, or a name on the hub.

    HF/                     config.json, *.safetensors, tokenizer files
    RUN/ (or converted)     model/ (config.json, tokenizer files, LICENSE), checkpoints/step_*/
"""

import dataclasses
import pathlib
from typing import Literal

from dqjax.config import ConfigError
from dqjax.models.config import ModelConfig, read_config


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
      kind: where the weights are: in safetensors ("huggingface"), or in `checkpoints/` ("run").
      folder: what was named.
      files: the folder of config.json, tokenizer files and licence.
    """

    kind: Literal["huggingface", "run"]
    folder: pathlib.Path

    @property
    def files(self) -> pathlib.Path:
        return self.folder if self.kind == "huggingface" else self.folder / "model"

    def config(self) -> ModelConfig:
        try:
            return read_config(self.files)
        except ValueError as e:
            raise ConfigError(str(e)) from None


def resolve_model(name: str | pathlib.Path) -> ModelSource:
    """The source that `name` points to; a name that is no folder is looked up on the hub (and fetched, safetensors only).

    Raises:
      ConfigError: neither a folder of a known form nor a name the hub has.
    """
    folder = pathlib.Path(name)
    if (folder / "model" / "config.json").is_file() and (folder / "checkpoints").is_dir():
        return ModelSource("run", folder)
    if (folder / "config.json").is_file():
        return ModelSource("huggingface", folder)
    if folder.exists():
        raise ConfigError(
            f"{folder} holds no model: expected config.json with safetensors, or a run folder with model/ and checkpoints/"
        )
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ConfigError(f"no folder at {folder}")
    return ModelSource("huggingface", _fetch(str(name)))


def _fetch(name: str) -> pathlib.Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*"]
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:  # the client raises its own, requests' and OS errors
        raise ConfigError(f"no folder at {name}, and the hub did not give it: {str(e).strip().splitlines()[0]}") from None
