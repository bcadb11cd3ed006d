"""Weights of a Hugging Face folder ↔ our parameters, tensor by tensor: one tensor of host memory plus the shards.

Only safetensors are read: a pickle (`pytorch_model.bin`) can run code when it is opened.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from dqjax.convert.names import IGNORED, Entry, entries, stored_tensors
from dqjax.convert.tensor_file import StoredTensor, Writer, read_header, split_by_size
from dqjax.models.config import ModelConfig
from dqjax.types import Params

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def load_params(
    folder: str | os.PathLike, config: ModelConfig, shardings: Any, dtype: Any = jnp.float32
) -> Params:
    """Reads the weights of a Hugging Face folder straight to their shardings.

    Each device's part is cut out of the mapped file, sent in the stored dtype and converted on the device; the layers of
    a stacked array go into it one by one, in place.

    Args:
      folder: holds model.safetensors, or model.safetensors.index.json and the files that it names.
      config: the model (`read_config(folder)`).
      shardings: one a parameter, as `Decoder.shardings()` gives, or one for all.
      dtype: of the parameters; None keeps the stored one.

    Raises:
      ValueError: a file is missing, corrupt or a pickle; a tensor is missing, unexpected or of another shape. Names it.
    """
    folder = pathlib.Path(folder)
    stored = check_tensors(folder, config)
    if config.tie_embeddings:
        _check_tied(stored)
    params: dict[str, Any] = {}
    lines = entries(config)
    with tqdm(total=sum(len(e.stored_names) for e in lines), desc="loading", unit="tensor", disable=None) as bar:
        for entry in lines:
            sharding = shardings if isinstance(shardings, Sharding) else _get(shardings, entry.path)
            _set(params, entry.path, _load(entry, stored, config, sharding, dtype, bar.update))
    return params


def stored_dtype(folder: str | os.PathLike) -> np.dtype:
    """The widest dtype among the weights of a Hugging Face folder; raises ValueError as `load_params` does."""
    found = {t.dtype for t in find_tensors(pathlib.Path(folder)).values()}
    return max(found, key=lambda d: (d.itemsize, d.name))


def save_params(
    params: Params | Callable[[tuple[str, ...]], Any],
    config: ModelConfig,
    folder: str | os.PathLike,
    *,
    dtype: Any = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters as safetensors of a Hugging Face folder, one tensor at a time.

    Files appear under their names when whole, the index last; weight files of an earlier export that are not part of this
    one are removed. On several hosts all must call; the first one writes.

    Args:
      params: the tree, its leaves jax arrays in any sharding or numpy arrays; or a function from a path to its leaf, called
        once a path, for parameters that are not all in memory.
      config: the model.
      folder: made if missing.
      dtype: bfloat16, float16 or float32.
      max_shard_bytes: a bound on a file's tensors; one file without an index if all fit.
    """
    folder, dtype = pathlib.Path(folder), jnp.dtype(dtype)
    leaf_of = params if callable(params) else functools.partial(_get, params)
    shapes = [(name, shape) for name, shape, _, _ in stored_tensors(config)]
    files = split_by_size(shapes, dtype.itemsize, max_shard_bytes)
    count = len(files)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    writing = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(shapes), desc="saving", unit="tensor", disable=None if writing else True))
        writers: dict[str, Writer] = {}
        if writing:
            folder.mkdir(parents=True, exist_ok=True)
            for name, tensors in zip(names, files):
                writer = stack.enter_context(Writer(folder / name, tensors, dtype))
                writers |= dict.fromkeys(tensors, writer)
        for entry in entries(config):
            leaf = leaf_of(entry.path)
            for layer, name in enumerate(entry.stored_names):
                array = _fetch(leaf, entry, layer, config, dtype)
                if writing:
                    writers[name].write(name, array)
                bar.update()
    if writing:
        _finish(folder, names, files, dtype)


def find_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """All tensors of a folder's safetensors, by name; model.safetensors goes before an index, as in transformers.

    Raises:
      ValueError: no safetensors, or a file that is missing or corrupt.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise ValueError(
                f"{folder} holds its weights as pickles only, which can run code when opened; expected {SINGLE}: "
                "take the safetensors of the same model, or convert it with transformers (save_pretrained)"
            )
        raise ValueError(f"no weights in {folder}; expected {SINGLE} or {INDEX}")
    tensors: dict[str, StoredTensor] = {}
    listed = _read_index(folder / INDEX)
    for file in sorted(set(listed.values())):
        header = read_header(folder / file)
        absent = sorted(n for n, f in listed.items() if f == file and n not in header)
        if absent:
            raise ValueError(f"{folder / file} lacks tensor {absent[0]!r}, which {INDEX} says it holds")
        twice = sorted(header.keys() & tensors.keys())
        if twice:
            raise ValueError(f"tensor {twice[0]!r} is both in {tensors[twice[0]].file} and in {folder / file}")
        tensors |= header
    return tensors


def check_tensors(folder: pathlib.Path, config: ModelConfig) -> dict[str, StoredTensor]:
    """`find_tensors`, proved to be what `config` asks for; a tied model may hold lm_head.weight too."""
    stored = {n: t for n, t in find_tensors(folder).items() if not IGNORED.fullmatch(n)}
    expected = {name: shape for name, shape, _, _ in stored_tensors(config)}
    optional = {"lm_head.weight": expected["model.embed_tokens.weight"]} if config.tie_embeddings else {}
    _refuse(
        [f"{folder}: tensor {n!r} is missing from its safetensors" for n in expected if n not in stored]
        + [
            f"{t.file}: unexpected tensor {n!r}; a {config.family} model of {config.num_layers} layers has none of that name"
            for n, t in stored.items()
            if n not in expected and n not in optional
        ]
        + [
            f"{stored[n].file}: tensor {n!r} has shape {list(stored[n].shape)}, config.json asks for {list(shape)}"
            for n, shape in (expected | optional).items()
            if n in stored and stored[n].shape != shape
        ]
    )
    return stored


def _refuse(complaints: list[str]) -> None:
    if complaints:
        more = f" (and {len(complaints) - 1} more such tensors)" if len(complaints) > 1 else ""
        raise ValueError(complaints[0] + more)


def _read_index(file: pathlib.Path) -> Mapping[str, str]:
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        sound = isinstance(listed, dict) and all(isinstance(f, str) and f == os.path.basename(f) for f in listed.values())
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        sound = False
    if not sound or not listed:
        raise ValueError(f"{file} is corrupt: expected a weight_map from tensor names to files of its folder")
    return listed


def _check_tied(stored: Mapping[str, StoredTensor]) -> None:
    head = stored.get("lm_head.weight")
    if head is None:
        return
    table, rows = stored["model.embed_tokens.weight"], 4096
    a, b = head.map(), table.map()
    if any(not np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, a.shape[0], rows)):
        raise ValueError(
            f"{head.file}: lm_head.weight differs from the embedding table, though config.json says tie_word_embeddings; "
            "set tie_word_embeddings to false if this model has two tables"
        )


def _load(
    entry: Entry,
    stored: Mapping[str, StoredTensor],
    config: ModelConfig,
    sharding: Sharding,
    dtype: Any,
    done: Callable[[], object],
) -> jax.Array:
    """One parameter, put together on the devices."""
    tensors = [stored[name] for name in entry.stored_names]
    dtype = jnp.dtype(tensors[0].dtype if dtype is None else dtype)
    shape = entry.shape_here(config)
    if entry.layers is None:
        array = _read(tensors[0], entry, config, sharding)
        done()
        return array if array.dtype == dtype else _convert(dtype, sharding)(array)
    stack = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    of_layer = sharding
    if isinstance(sharding, NamedSharding):
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    for i, tensor in enumerate(tensors):
        # Waiting bounds host memory: dispatch would run ahead and read more tensors before these are gone.
        stack = jax.block_until_ready(_put_layer(sharding)(stack, _read(tensor, entry, config, of_layer), i))
        done()
    return stack


def _read(tensor: StoredTensor, entry: Entry, config: ModelConfig, sharding: Sharding) -> jax.Array:
    """One stored tensor in our layout and its own dtype, each device given the part it needs."""
    mapped = tensor.map()
    parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one copy

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = entry.layout.take(mapped, index, config)
        return parts[key]

    return jax.make_array_from_callback(entry.layout.shape_here(config), sharding, part)


@functools.cache
def _convert(dtype: np.dtype, sharding: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)


@functools.cache
def _put_layer(sharding: Sharding) -> Callable[..., jax.Array]:
    """(stack [L, …], layer […], i) → the stack with layer i replaced, in place."""

    def put(stack, layer, i):
        return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, 0)

    return jax.jit(put, out_shardings=sharding, donate_argnums=0)


def _fetch(leaf: Any, entry: Entry, layer: int, config: ModelConfig, dtype: np.dtype) -> np.ndarray:
    """One tensor in its stored form on this host."""
    if tuple(leaf.shape) != entry.shape_here(config):
        raise ValueError(
            f"parameter {'.'.join(entry.path)} has shape {tuple(leaf.shape)}, config.json asks for {entry.shape_here(config)}"
        )
    stacked = entry.layers is not None
    if isinstance(leaf, jax.Array):
        sharding = leaf.sharding
        whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
        array = np.asarray(_take_layer(dtype, whole)(leaf, layer, stacked=stacked).addressable_data(0))
    else:
        array = np.asarray(leaf[layer] if stacked else leaf).astype(dtype, copy=False)
    return entry.layout.restore(array, config)


@functools.cache
def _take_layer(dtype: np.dtype, whole: Sharding) -> Callable[..., jax.Array]:
    """(leaf, i, stacked) → the leaf, or layer i of it, in `dtype` and whole on every device."""

    def take(leaf, i, *, stacked):
        layer = jax.lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False) if stacked else leaf
        return layer.astype(dtype)

    return jax.jit(take, out_shardings=whole, static_argnames="stacked")


def _finish(folder: pathlib.Path, names: list[str], files: list[dict[str, tuple[int, ...]]], dtype: np.dtype) -> None:
    """Removes the weight files of an earlier export and writes the index of several files."""
    for old in folder.iterdir():
        if WEIGHT_FILES.fullmatch(old.name) and old.name not in names:
            old.unlink()
    if len(names) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    elements = sum(int(np.prod(shape)) for shapes in files for shape in shapes.values())
    index = {
        "metadata": {"total_parameters": elements, "total_size": elements * dtype.itemsize},
        "weight_map": dict(sorted((tensor, name) for name, shapes in zip(names, files) for tensor in shapes)),
    }
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_text(file: pathlib.Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        if key not in tree:
            raise ValueError(f"the parameters have no {'.'.join(path)} (missing at {key!r})")
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
