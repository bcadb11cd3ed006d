"""Reward models and scorers on disk: a trunk with a classification head, as `…ForSequenceClassification` stores them."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import yaml

from dqjax.config import ConfigError
from dqjax.convert.source import ModelSource
from dqjax.models.config import ModelConfig, from_huggingface, to_huggingface

SUFFIX = "ForSequenceClassification"

LABELS: Mapping[str, tuple[str, ...]] = {
    "reward": ("reward",),
    "scorer": tuple(f"{name}_{level}" for name in ("verbosity", "difficulty") for level in range(10)),
}
"""Names of a head's rows, by the objective that trains them."""


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(ModelConfig):
    """The config of a trunk, with the names of its head's rows. The trunk has no output table of its own."""

    labels: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        """All parameters of trunk and head."""
        return super().num_parameters + len(self.labels) * self.hidden_size


def classifier_config(source: ModelSource) -> ClassifierConfig | None:
    """The config of a classifier: a run of one, or a folder whose architecture is one.

    Returns:
      None for everything else, a damaged folder included: `source.config()` says what is wrong with it.

    Raises:
      ConfigError: a classifier whose trunk is not implemented.
    """
    values = _mapping(source.files / "config.json")
    if source.kind == "run":
        labels = LABELS.get((_mapping(source.folder / "config.yaml").get("objective") or {}).get("kind"), ())
    else:
        labels = _labels(values)
    if not labels:
        return None
    try:
        trunk = from_huggingface({key: value for key, value in values.items() if key != "architectures"})
    except ValueError as e:
        raise ConfigError(f"{source.files / 'config.json'}: {e}") from None
    fields = {field.name: getattr(trunk, field.name) for field in dataclasses.fields(trunk)}
    return ClassifierConfig(**fields | {"tie_embeddings": True}, labels=labels)


def classifier_to_huggingface(config: ClassifierConfig, *, dtype: str) -> dict[str, Any]:
    """The keys of `config.json` that describe a classifier.

    A single logit is a `regression` problem, which servers answer raw; they would put it through a sigmoid otherwise.
    """
    values = to_huggingface(config, dtype=dtype)
    return values | ({"problem_type": "regression"} if len(config.labels) == 1 else {}) | {
        "architectures": [values["architectures"][0].removesuffix("ForCausalLM") + SUFFIX],
        "id2label": {str(i): name for i, name in enumerate(config.labels)},
        "label2id": {name: i for i, name in enumerate(config.labels)},
        "use_cache": False,
    }


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The head's rows by config.json; transformers counts two where nothing is said."""
    if not any(name.endswith(SUFFIX) for name in values.get("architectures") or []):
        return ()
    named = values.get("id2label") or {i: f"LABEL_{i}" for i in range(values.get("num_labels", 2))}
    return tuple(name for _, name in sorted((int(i), str(name)) for i, name in named.items()))


def _mapping(path: pathlib.Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file (YAML reads both); {} where it is missing or damaged."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
