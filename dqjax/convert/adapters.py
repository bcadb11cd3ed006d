"""Low-rank adapters on disk: what a run that trained them says of its base, and PEFT's format.

adapter_config.json          rank, alpha, targets, name of the base
adapter_model.safetensors    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [R, in], lora_B [out, R]
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import yaml

from dqjax.config import ConfigError, validate
from dqjax.convert.huggingface import write_text
from dqjax.convert.names import TABLE
from dqjax.convert.source import ModelSource, resolve_model
from dqjax.convert.tensor_file import Writer
from dqjax.models.config import ModelConfig
from dqjax.models.lora import PRODUCTS, LoRAConfig

Read = Callable[[tuple[str, ...]], np.ndarray]
"""From a path in the parameter tree to that parameter in host memory."""


@dataclasses.dataclass(frozen=True)
class AdapterRun:
    """A run folder whose checkpoints hold adapters.

    Attributes:
      config: of the adapters.
      base: the model that they were trained on.
      base_name: as the run's config has it.
    """

    config: LoRAConfig
    base: ModelSource
    base_name: str


def adapter_run(source: ModelSource) -> AdapterRun | None:
    """What a run's config says of its adapters; None for a folder whose checkpoints hold whole models.

    Raises:
      ConfigError: a damaged config, or the base is no longer where it was.
    """
    if source.kind != "run":
        return None
    path = source.folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        lora = values.get("lora")
        name = lora and values["model"]["init_from"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is not the config of a run ({e}); restore it") from None
    if lora is None:
        return None
    return AdapterRun(validate(LoRAConfig, lora, where=f"{path}: lora"), resolve_model(name), name)


def merged(read: Read, base: Read, config: LoRAConfig, path: tuple[str, ...]) -> np.ndarray:
    """The parameter at `path` of the base with its adapters added, float32 where there are any.

    Args:
      read: of the adapters' checkpoint; base: of the base model.
    """
    if path[0] == "score":
        return read(path)
    inputs = {
        ("layers", *product.path, "kernel"): product.inputs
        for name, product in PRODUCTS.items()
        if name in config.targets
    }
    if path not in inputs:
        return base(path)
    a, b = (np.asarray(read((*path[:-1], name)), np.float32) for name in ("lora_a", "lora_b"))
    kernel = np.asarray(base(path), np.float32)
    rank, L = config.rank, len(kernel)
    low = np.matmul(a.reshape(L, -1, rank), b.reshape(L, rank, -1)) * (config.alpha / rank)
    return kernel + low.reshape(kernel.shape)


def save_peft(
    read: Read, run: AdapterRun, config: ModelConfig, folder: pathlib.Path, *, base_name: str, head: bool
) -> None:
    """Writes adapters as PEFT does, float32.

    Args:
      read: of the adapters' checkpoint.
      config: of the base.
      head: a classifier's head was trained besides; it is stored whole.
    """
    tensors = dict(_tensors(read, run.config, config))
    if head:
        tensors["base_model.model.score.weight"] = np.asarray(read(("score", "kernel")))
    with Writer(
        folder / "adapter_model.safetensors", {n: x.shape for n, x in tensors.items()}, np.dtype(np.float32)
    ) as out:
        for name, array in tensors.items():
            out.write(name, array)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": run.config.rank,
        "lora_alpha": run.config.alpha,
        "target_modules": list(run.config.targets),
        "modules_to_save": ["score"] if head else None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_text(folder / "adapter_config.json", json.dumps(values, indent=2) + "\n")


def _tensors(read: Read, lora: LoRAConfig, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(PEFT's name, array) of every adapter."""
    names = {path: name for name, path, _, _ in TABLE}
    for target in lora.targets:
        path = ("layers", *PRODUCTS[target].path)
        stored = names[".".join((*path, "kernel"))].removesuffix(".weight")
        a, b = (np.asarray(read((*path, name)), np.float32) for name in ("lora_a", "lora_b"))
        for layer in range(config.num_layers):
            place = f"base_model.model.{stored.format(layer)}"
            yield f"{place}.lora_A.weight", np.ascontiguousarray(a[layer].reshape(-1, lora.rank).T)
            yield f"{place}.lora_B.weight", np.ascontiguousarray(b[layer].reshape(lora.rank, -1).T)
