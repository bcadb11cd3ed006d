"""Parameters of a checkpoint, one at a time, and a checkpoint made of a Hugging Face folder."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

import dqjax
from dqjax.checkpoint import Checkpoints
from dqjax.config import ConfigError
from dqjax.convert.adapters import Read, adapter_run, merged
from dqjax.convert.classifier import classifier_config
from dqjax.convert.huggingface import load_params, stored_dtype
from dqjax.convert.source import ModelSource

FOLDER = "checkpoints"


def open_model(source: ModelSource, step: int | None = None) -> tuple[int, Read]:
    """`open_checkpoint`, with the adapters of a run that trained such added to the weights of its base."""
    found, read = open_checkpoint(source, step)
    if (run := adapter_run(source)) is None:
        return found, read
    if run.base.kind != "huggingface":
        base = open_model(run.base)[1]
    else:
        config = classifier_config(run.base) or run.base.config()
        params = load_params(run.base.folder, config, _on_the_host(), dtype=stored_dtype(run.base.folder))
        base = lambda path: functools.reduce(lambda tree, key: tree[key], path, params)  # noqa: E731
    return found, functools.partial(merged, read, base, run.config)


def open_checkpoint(source: ModelSource, step: int | None = None) -> tuple[int, Read]:
    """The newest intact checkpoint of a run or converted folder (or `step`), to be read parameter by parameter.

    Returns:
      Its step, and a function from a path in the parameter tree to that parameter in host memory.

    Raises:
      ConfigError: no checkpoint.
      ValueError: `step` is not there, or a file is damaged; names it.
    """
    checkpoints = Checkpoints(source.folder.resolve() / FOLDER)
    try:
        found = checkpoints.intact_step(step)
    finally:
        checkpoints.close()
    if found is None:
        raise ConfigError(f"{source.folder} has no complete checkpoint yet")
    folder = checkpoints.path(found) / "params"
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def read(path: tuple[str, ...]) -> np.ndarray:
        item: Any = 0
        how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(path):
            item, how = {key: item}, {key: how}
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True))
        for key in path:
            tree = tree[key]
        return tree

    return found, read


def write_checkpoint(source: ModelSource, folder: pathlib.Path) -> None:
    """Writes the weights of a Hugging Face folder as checkpoint 0 of `folder`, in the dtype they are stored in."""
    params = load_params(source.folder, classifier_config(source) or source.config(), _on_the_host(), dtype=stored_dtype(source.folder))
    checkpoints = Checkpoints(folder.resolve() / FOLDER)
    try:
        checkpoints.save(0, {"params": params}, {"dqjax": dqjax.__version__, "converted": True})
    finally:
        checkpoints.close()


def _on_the_host() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
