"""Writes a `data.sample_cache`, shard by shard; a writer that was killed goes on behind its last whole shard.

    unfinished-0-of-1.json     after each shard: a manifest of the shards so far
    manifest-0-of-1.json       at the end, instead

Added in the same order again, the samples give the same files as if the writer had not been killed.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from dqjax.config import ConfigError
from dqjax.data.sample_cache import (
    FORMAT,
    MANIFEST,
    UNFINISHED,
    Field,
    check_file,
    fingerprint,
    read_manifest,
    sample_key,
)


class CacheWriter:
    """Writes a cache; use as a context, whose end without an error writes the manifest.

    Args:
      folder: made if missing; may hold an unfinished cache of the same `fields`, `meta` and parts, and no other.
      fields: by name.
      meta: what the arrays depend on (JSON values); a reader compares it with what it expects.
      part: (number of this process, processes that write).
      shard_rows: rows after which a shard is full: what a killed writer does again at most.

    Raises:
      ConfigError: `folder` holds a cache already, one begun by another command, or a damaged shard.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        fields: Mapping[str, Field],
        meta: Mapping[str, Any],
        *,
        part: tuple[int, int] = (0, 1),
        shard_rows: int = 1 << 20,
    ):
        self.folder, self._fields, self._part, self._full = folder, dict(fields), part, shard_rows
        folder.mkdir(parents=True, exist_ok=True)
        values = {
            "format": FORMAT,
            "parts": part[1],
            "fields": {name: dataclasses.asdict(field) for name, field in self._fields.items()},
            "meta": dict(meta),
        }
        manifest = json.loads(json.dumps(values))  # as it is read back
        self._manifest: dict[str, Any] = manifest | {"files": self._begun(manifest)}
        keys = [name for name in self._files if name.endswith(".keys.npy")]
        self._shards = len(keys)
        self._written = {int(key) for name in keys for key in np.load(folder / name)}
        self._start_shard()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._end_shard()
            self._write_manifest(MANIFEST)
            (self.folder / UNFINISHED.format(*self._part)).unlink(missing_ok=True)

    @property
    def samples(self) -> int:
        """Samples added so far, those of a killed writer included."""
        return len(self._written)

    def holds(self, id: str, tokens: Int[np.ndarray, " n"]) -> bool:
        """Whether a sample was added."""
        return sample_key(id, tokens) in self._written

    def add(self, id: str, tokens: Int[np.ndarray, " n"], rows: Mapping[str, np.ndarray]) -> None:
        """Adds the rows of a sample: as many of each field. One that was added before is left as it is."""
        key = sample_key(id, tokens)
        if key in self._written:
            return
        self._written.add(key)
        counts = set()
        for name, field in self._fields.items():
            array = np.ascontiguousarray(rows[name], np.dtype(field.dtype))
            if array.shape[1:] != field.shape:
                raise ValueError(f"field {name}: expected rows of shape {field.shape}, got {array.shape[1:]}")
            counts.add(len(array))
            self._pending[name].append(array)
        if len(counts) != 1:
            raise ValueError(f"sample {id!r}: its fields have {sorted(counts)} rows; expected one number")
        self._keys.append(key)
        self._starts.append(self._starts[-1] + counts.pop())
        if self._starts[-1] >= self._full:
            self._end_shard()
            self._write_manifest(UNFINISHED)
            self._start_shard()

    @property
    def _files(self) -> dict[str, dict[str, Any]]:
        return self._manifest["files"]

    def _begun(self, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The files that an earlier writer of this part has finished, checked."""
        left = sorted(path.name for path in self.folder.glob("*-of-*.json"))
        parts = {int(re.search(r"-of-(\d+)", name)[1]) for name in left}
        if parts and sum(name.startswith("manifest-") for name in left) == max(parts):
            raise ConfigError(f"{self.folder} holds a cache already; remove it, or give another folder")
        if parts - {self._part[1]}:
            raise ConfigError(
                f"{self.folder} holds an unfinished cache of {max(parts)} processes, here are {self._part[1]}; "
                "start as many, remove it, or give another folder"
            )
        files: dict[str, dict[str, Any]] = {}
        for name in (UNFINISHED.format(*self._part), MANIFEST.format(*self._part)):
            if name not in left:
                continue
            found = read_manifest(self.folder / name)
            for key, value in manifest.items():
                if found[key] != value:
                    raise ConfigError(
                        f"{self.folder} holds an unfinished cache of another command ({key}: "
                        f"{_difference(found[key], value)}); finish it with that one, remove it, or give another folder"
                    )
            files = found["files"]
        for name, entry in files.items():
            check_file(self.folder / name, entry)
        return files

    def _write_manifest(self, name: str) -> None:
        name = name.format(*self._part)
        making = self.folder / f".{name}.partial"
        making.write_text(json.dumps(self._manifest, indent=1))
        making.rename(self.folder / name)

    def _start_shard(self) -> None:
        self._keys: list[int] = []
        self._starts = [0]
        self._pending: dict[str, list[np.ndarray]] = {name: [] for name in self._fields}

    def _end_shard(self) -> None:
        if not self._keys:
            return
        arrays = {"keys": np.array(self._keys, np.uint64), "starts": np.array(self._starts, np.int64)}
        # numpy's files know no bfloat16: its bits are stored as uint16
        arrays |= {name: _as_bits(np.concatenate(parts)) for name, parts in self._pending.items()}
        for name, array in arrays.items():
            path = self.folder / f"shard-{self._part[0]:03}-{self._shards:05}.{name}.npy"
            np.save(path, array)
            self._files[path.name] = fingerprint(path)
        self._shards += 1


def _as_bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == np.dtype("bfloat16") else array


def _difference(found: Any, expected: Any) -> str:
    """What was found and what is expected, of mappings the first entry that differs."""
    if not isinstance(found, dict):
        return f"{found}, here {expected}"
    name = next(name for name in (*expected, *found) if found.get(name) != expected.get(name))
    return f"{name} {found.get(name)}, here {expected.get(name)}"
