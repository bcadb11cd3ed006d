"""safetensors files, a tensor at a time: reading maps one tensor, writing holds one tensor.

The library of that name keeps a whole file mapped and wants all tensors of a file at once to write it, and its numpy side
knows no bfloat16. The format (https://github.com/huggingface/safetensors#format)::

    8 bytes     length n of the header, little-endian
    n bytes     JSON: {name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {…}}
    the rest    the tensors, row-major, little-endian, end to end without gaps
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}

_MAX_HEADER = 100_000_000  # the library's own bound


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
      file: the file that holds it.
      dtype: its element type.
      shape: its shape.
      offset: of its first byte, from the start of the file.
    """

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """The tensor as a read-only mapping of its part of the file; pages stay resident while the result lives."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


def read_header(file: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
      ValueError: missing, truncated or corrupt, or of a dtype that is no plain float; names the file.
    """
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise _corrupt(file, f"its header should be {length} bytes long, the file has {size}")
            header = json.loads(f.read(length).decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise _corrupt(file, f"its header is not JSON ({e})") from None
    if not isinstance(header, dict):
        raise _corrupt(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end))
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise _corrupt(file, f"its entry for {name!r} is malformed")
        if code not in DTYPES:
            raise ValueError(f"{file}: tensor {name!r} is {code}; only {', '.join(DTYPES)} can be read")
        if end - begin != math.prod(shape) * DTYPES[code].itemsize:
            raise _corrupt(file, f"tensor {name!r} of {code} {list(shape)} has {end - begin} bytes")
        tensors[name] = StoredTensor(file, DTYPES[code], shape, 8 + length + begin)
        spans.append((begin, end))
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise _corrupt(file, f"its tensors leave a gap or overlap at byte {reached} of the data")
        reached = end
    if 8 + length + reached != size:
        raise _corrupt(file, f"the header promises {8 + length + reached} bytes, the file has {size}")
    return tensors


def _corrupt(file: pathlib.Path, why: str) -> ValueError:
    return ValueError(f"{file} is truncated or corrupt: {why}; copy it again from its source")


class Writer:
    """Writes a safetensors file tensor by tensor, in any order; it appears under its name when complete.

        with Writer(file, {"a": (3, 4), "b": (5,)}, dtype) as w:
            w.write("b", b)
            w.write("a", a)
    """

    def __init__(self, file: pathlib.Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        self._file, self._dtype, self._shapes = file, np.dtype(dtype), dict(shapes)
        self._temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        self._missing = set(shapes)
        spans = _spans(shapes, self._dtype)
        header = _header(shapes, spans, self._dtype)
        self._offsets = {name: len(header) + begin for name, (begin, _) in spans.items()}
        self._out = open(self._temporary, "wb")
        self._out.write(header)

    def __enter__(self) -> "Writer":
        return self

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts a tensor in its place; raises ValueError unless its shape is the one announced."""
        if array.shape != self._shapes[name]:
            raise ValueError(f"{self._file}: expected {name} of shape {self._shapes[name]}, got {array.shape}")
        self._out.seek(self._offsets[name])
        self._out.write(np.ascontiguousarray(array, self._dtype).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        complete = kind is None and not self._missing
        if complete:
            self._out.flush()
            os.fsync(self._out.fileno())
        self._out.close()
        if complete:
            os.replace(self._temporary, self._file)
            return
        self._temporary.unlink(missing_ok=True)
        if kind is None:
            raise ValueError(f"{self._file}: {sorted(self._missing)[0]} was announced and not written")


def _spans(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> dict[str, tuple[int, int]]:
    """(begin, end) of each tensor in the data."""
    ends = list(itertools.accumulate(math.prod(shape) * dtype.itemsize for shape in shapes.values()))
    return {name: (begin, end) for name, begin, end in zip(shapes, [0, *ends], ends)}


def _header(
    shapes: Mapping[str, tuple[int, ...]], spans: Mapping[str, tuple[int, int]], dtype: np.dtype
) -> bytes:
    codes = {stored: code for code, stored in DTYPES.items()}
    if dtype not in codes:
        raise ValueError(f"weights cannot be written as {dtype}; expected one of {', '.join(str(d) for d in codes)}")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": list(spans[name])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as mapped readers expect
    return struct.pack("<Q", len(text)) + text


def split_by_size(
    tensors: Iterable[tuple[str, tuple[int, ...]]], itemsize: int, max_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """Cuts a sequence of (name, shape) into files of at most `max_bytes`, order kept; a larger tensor gets its own."""
    files: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in tensors:
        size = math.prod(shape) * itemsize
        if files[-1] and used + size > max_bytes:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += size
    return files
