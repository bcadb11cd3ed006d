"""Arrays by sample, on disk: what a teacher or a reference says of each sequence, computed once.

    CACHE/
      manifest-0-of-1.json       the fields (name, dtype, shape of a row), what made them, every file's size and SHA-256
      shard-000-00000.keys.npy   [n] uint64: a hash of each sample's id and tokens
      shard-000-00000.starts.npy [n + 1] int64: the rows of sample i are starts[i]:starts[i + 1]
      shard-000-00000.NAME.npy   [rows, ...] of each field

A sample is found by its id and its tokens, never by its place, so any number of hosts may read in any order, and a
sample that is tokenised otherwise than it was is missing instead of wrong. Each writing process has a manifest, written
last: a cache without all of them does not exist. Files are mapped into memory, not read. `data.cache_writer` writes it.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - makes bfloat16 a name that numpy knows
import numpy as np
from jaxtyping import Int

from dqjax.config import ConfigError

FORMAT = 1
MANIFEST = "manifest-{}-of-{}.json"
UNFINISHED = "unfinished-{}-of-{}.json"  # a manifest of the shards written so far


def sample_key(id: str, tokens: Int[np.ndarray, " n"]) -> int:
    """A 64-bit hash of a sample's id and its tokens."""
    digest = hashlib.blake2b(id.encode(errors="surrogatepass") + b"\0", digest_size=8)
    digest.update(np.ascontiguousarray(tokens, np.int32).tobytes())
    return int.from_bytes(digest.digest(), "little")


@dataclasses.dataclass(frozen=True)
class Field:
    """An array of a cache: its dtype by name (numpy's, or bfloat16), and the shape of one row."""

    dtype: str
    shape: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class SampleCache:
    """A cache, checked whole and open for reading.

    Attributes:
      fields: by name.
      meta: what the writer said.
    """

    def __init__(self, folder: str | pathlib.Path):
        """Reads the manifests and checks every file's size and SHA-256 (about a second a gigabyte).

        Raises:
          ConfigError: no cache, an unfinished one, or a file that is not as it was written; names the file.
        """
        self.folder = pathlib.Path(folder)
        manifests = [read_manifest(path) for path in sorted(self.folder.glob(MANIFEST.format("*", "*")))]
        if not manifests:
            if any(self.folder.glob(UNFINISHED.format("*", "*"))):
                raise ConfigError(f"{folder}: its writing was not finished; start the same command again")
            raise ConfigError(f"no cache at {folder}: expected a folder with {MANIFEST.format(0, 1)} and shards")
        if len(manifests) != manifests[0]["parts"]:
            parts = manifests[0]["parts"]
            raise ConfigError(
                f"{folder}: {len(manifests)} of {parts} manifests; its writing was not finished; "
                "start the same command again"
            )
        self.meta: Mapping[str, Any] = manifests[0]["meta"]
        self.fields = {name: Field(f["dtype"], tuple(f["shape"])) for name, f in manifests[0]["fields"].items()}
        files = {name: entry for manifest in manifests for name, entry in manifest["files"].items()}
        for name, entry in sorted(files.items()):
            check_file(self.folder / name, entry)
        self._shards = [
            self._open(name.removesuffix(".keys.npy")) for name in sorted(files) if name.endswith(".keys.npy")
        ]
        keys = [np.asarray(shard["keys"]) for shard in self._shards]
        self._shard_of = np.repeat(np.arange(len(keys)), [len(k) for k in keys])
        self._place_of = np.concatenate([np.arange(len(k)) for k in keys]) if keys else np.zeros(0, np.int64)
        everything = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
        self._order = np.argsort(everything, kind="stable")
        self._sorted = everything[self._order]

    def __len__(self) -> int:
        """Samples."""
        return len(self._sorted)

    def count(self, id: str, tokens: Int[np.ndarray, " n"]) -> int | None:
        """Rows of a sample; None where the cache has none of this id and these tokens."""
        found = self._find(id, tokens)
        return None if found is None else int(found[2] - found[1])

    def rows(self, id: str, tokens: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Each field's rows of a sample.

        Raises:
          ValueError: the cache has no sample of this id and these tokens.
        """
        found = self._find(id, tokens)
        if found is None:
            raise ValueError(
                f"{self.folder} holds nothing for sample {id!r} as it is tokenised now; write the cache anew"
            )
        shard, begin, end = found
        return {name: shard[name][begin:end].view(np.dtype(field.dtype)) for name, field in self.fields.items()}

    def _find(self, id: str, tokens: Int[np.ndarray, " n"]) -> tuple[Mapping[str, np.ndarray], int, int] | None:
        """The shard of a sample, and where its rows begin and end there."""
        key = np.uint64(sample_key(id, tokens))
        place = int(np.searchsorted(self._sorted, key))
        if place == len(self._sorted) or self._sorted[place] != key:
            return None
        sample = self._order[place]
        shard, i = self._shards[self._shard_of[sample]], self._place_of[sample]
        return shard, shard["starts"][i], shard["starts"][i + 1]

    def _open(self, prefix: str) -> dict[str, np.ndarray]:
        names = ("keys", "starts", *self.fields)
        return {name: np.load(self.folder / f"{prefix}.{name}.npy", mmap_mode="r") for name in names}


def expect_meta(cache: SampleCache, expected: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raises ConfigError, with the reason of its key, where a cache was written for something else than `expected`."""
    for key, value in expected.items():
        if (got := cache.meta.get(key)) != value:
            raise ConfigError(
                f"{cache.folder} was written with {reasons[key]} ({key} {got}, here {value}); write it anew"
            )


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """What a manifest says; raises ConfigError, naming it, where it is damaged or of another format."""
    try:
        manifest = json.loads(path.read_text())
        known = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path} is no manifest of a cache ({e}); write the cache anew") from None
    if not known:
        raise ConfigError(f"{path}: expected format {FORMAT}, got {manifest['format']}; write the cache anew")
    return manifest


def fingerprint(path: pathlib.Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def check_file(path: pathlib.Path, entry: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming the file, unless it has the fingerprint `entry`."""
    if not path.is_file():
        raise ConfigError(f"{path} is missing; copy the cache again, or write it anew")
    if (size := path.stat().st_size) != entry["size"]:
        raise ConfigError(f"{path} has {size} bytes, expected {entry['size']}; copy the cache again, or write it anew")
    if fingerprint(path)["sha256"] != entry["sha256"]:
        raise ConfigError(f"{path} is not as it was written (another SHA-256); copy the cache again, or write it anew")
