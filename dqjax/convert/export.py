"""A folder that transformers, vLLM and kin load: weights, configs, tokenizer, licence and card."""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from dqjax.config import ConfigError
from dqjax.convert.adapters import adapter_run, save_peft
from dqjax.convert.card import Card
from dqjax.convert.classifier import ClassifierConfig, classifier_config, classifier_to_huggingface
from dqjax.convert.checkpoint import open_checkpoint, open_model, write_checkpoint
from dqjax.convert.huggingface import save_params, write_text
from dqjax.convert.licence import NO_BASE, Licence, licence_files, recognise_licence
from dqjax.convert.serving import TOKENIZER_FILES, chat_template, generation_config, special_tokens, thinking_mode
from dqjax.convert.source import ModelSource, resolve_model
from dqjax.models.config import to_huggingface


def from_huggingface(name: str, folder: pathlib.Path) -> Licence:
    """Converts a Hugging Face folder (or hub name) to a checkpoint folder, whole or not at all.

    Raises:
      ConfigError: `name` is no Hugging Face model, or `folder` is in use.
      ValueError: its weights are not what its config asks for.
    """
    source = resolve_model(name)
    if source.kind != "huggingface":
        raise ConfigError(f"{name} is a {source.kind} folder already; from-hf takes a Hugging Face folder")
    with appearing(folder) as building:
        write_checkpoint(source, building)
        model = building / "model"
        model.mkdir()
        _copy(source.files, model, ("config.json", "generation_config.json", "README.md", *TOKENIZER_FILES))
        for path in licence_files(source.files):
            shutil.copyfile(path, model / path.name)
    return recognise_licence(source.files, classifier_config(source) or source.config())


def to_huggingface_folder(
    name: str,
    folder: pathlib.Path,
    *,
    step: int | None = None,
    dtype: str = "bfloat16",
    base: str | None = None,
    teachers: Sequence[str] = (),
    data: Sequence[str] = (),
    max_shard_bytes: int = 5_000_000_000,
) -> Card:
    """Exports a run folder or a converted checkpoint, whole or not at all.

    Args:
      name: as `resolve_model` takes it.
      folder: must not exist, or be empty.
      step: of a run's checkpoint; None takes the newest intact one.
      dtype: of the stored weights.
      base, teachers, data: for the card; base and data are read from the run's config where they are not given.
      max_shard_bytes: of one weight file.

    Returns:
      The card that was written.

    Raises:
      ConfigError: `name` is no such folder, has no checkpoint, or `folder` is in use.
      ValueError: the checkpoint is damaged or does not fit its config.json.
    """
    source = resolve_model(name)
    if source.kind == "huggingface":
        raise ConfigError(f"{name} is a Hugging Face folder already; to-hf takes a run folder or a converted checkpoint")
    run = _run_config(source)
    config = classifier_config(source) or source.config()
    classifies = isinstance(config, ClassifierConfig)
    step, read = open_model(source, step)
    with appearing(folder) as building:
        save_params(read, config, building, dtype=dtype, max_shard_bytes=max_shard_bytes)
        _copy(source.files, building, TOKENIZER_FILES)
        for path in licence_files(source.files):
            shutil.copyfile(path, building / path.name)
        tokens = special_tokens(source.files)
        thinking = thinking_mode(chat_template(source.files))
        generation = generation_config(source.files, tokens, thinking)
        stops = generation.get("eos_token_id") or [None]
        values = classifier_to_huggingface(config, dtype=dtype) if classifies else to_huggingface(config, dtype=dtype)
        values |= {
            "bos_token_id": tokens.get("bos"),
            "eos_token_id": stops[0],
            "pad_token_id": tokens.get("pad"),
            "transformers_version": version("transformers"),
        }
        _write_json(building / "config.json", values)
        if not classifies:
            _write_json(building / "generation_config.json", generation)
        base = base or _base_name(source, run)
        card = Card(
            title=folder.resolve().name,
            base=base,
            licence=NO_BASE if base is None else recognise_licence(source.files, config),
            teachers=tuple(teachers),
            data=tuple(data) or _data_names(run),
            thinking=thinking,
            sampling={k: generation[k] for k in ("temperature", "top_p", "top_k")},
            parameters=config.num_parameters,
            training_config=yaml.safe_dump(run, sort_keys=False) if run else None,
            step=step,
            labels=config.labels if classifies else (),
            dtype=dtype,
        )
        write_text(building / "README.md", card.text())
    return card


def to_peft_folder(name: str, folder: pathlib.Path, *, step: int | None = None, base: str | None = None) -> int:
    """Exports the adapters of a run in PEFT's format, whole or not at all; returns their checkpoint's step.

    Args:
      base: name or path of the base for adapter_config.json; by default as the run's config has it.

    Raises:
      ConfigError: `name` is no run that trained adapters, or `folder` is in use.
    """
    source = resolve_model(name)
    run = adapter_run(source)
    if run is None:
        raise ConfigError(
            f"{name} holds no adapters: expected a run whose config has a lora section; to-hf exports whole models"
        )
    step, read = open_checkpoint(source, step)
    with appearing(folder) as building:
        head = classifier_config(source) is not None
        save_peft(read, run, source.config(), building, base_name=base or run.base_name, head=head)
        _copy(source.files, building, TOKENIZER_FILES)
        for path in licence_files(source.files):
            shutil.copyfile(path, building / path.name)
    return step


def _run_config(source: ModelSource) -> dict[str, Any]:
    if source.kind != "run":
        return {}
    path = source.folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid YAML ({e}); restore it, or export without it from a converted checkpoint") from None
    return values if isinstance(values, dict) else {}


def _base_name(source: ModelSource, run: Mapping[str, Any]) -> str | None:
    """The base as a name, never as a path of this machine."""
    if source.kind == "run":
        name = (run.get("model") or {}).get("init_from")
        if name is None:
            return None
        return name if name.count("/") == 1 and not pathlib.Path(name).exists() else pathlib.Path(name).resolve().name
    return source.folder.resolve().name


def _data_names(run: Mapping[str, Any]) -> tuple[str, ...]:
    """What the run's config calls its sources."""
    sources = (run.get("data") or {}).get("sources") or []
    names = []
    for entry in [sources] if isinstance(sources, (str, dict)) else sources:
        entry = {"path": entry} if isinstance(entry, str) else entry
        names.append(entry.get("name") or entry.get("task") or entry.get("hub") or pathlib.Path(entry["path"]).name)
    return tuple(names)


def _copy(source: pathlib.Path, target: pathlib.Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to build in, which takes the name `folder` if all goes well and is removed if not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder; give another name, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    try:
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    if folder.exists():
        folder.rmdir()
    building.rename(folder)
