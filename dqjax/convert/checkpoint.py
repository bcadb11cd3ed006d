"""Parameters of a checkpoint, one at a time, and a checkpoint made of a Hugging Face folder."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

import dqjax
from dqjax.checkpoint import Checkpoints
from dqjax.config import ConfigError
from dqjax.convert.classifier import classifier_config
from dqjax.convert.huggingface import load_params, stored_dtype
from dqjax.convert.source import ModelSource

FOLDER = "checkpoints"


def open_checkpoint(source: ModelSource, step: int | None = None) -> tuple[int, Callable[[tuple[str, ...]], np.ndarray]]:
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
    device = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    params = load_params(source.folder, classifier_config(source) or source.config(), device, dtype=stored_dtype(source.folder))
    checkpoints = Checkpoints(folder.resolve() / FOLDER)
    try:
        checkpoints.save(0, {"params": params}, {"dqjax": dqjax.__version__, "converted": True})
    finally:
        checkpoints.close()
