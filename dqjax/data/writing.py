"""Files of rows that get their names only when they are complete."""

import contextlib
import json
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from dqjax.config import ConfigError
from dqjax.data.config import FILE_SUFFIXES

_TOGETHER = 4096  # rows of a parquet row group


class RowWriter(contextlib.AbstractContextManager):
    """A jsonl or parquet file, by its suffix. After an error the old file, if there was one, is still there.

    Raises (on entering or writing):
      ConfigError: another suffix, or rows of different types in one parquet column.
    """

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        if self.path.suffix not in FILE_SUFFIXES:
            raise ConfigError(f"{path}: expected a name that ends in .jsonl or .parquet")
        self.rows = 0
        self._making = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")

    def __enter__(self) -> "RowWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._parquet = _Parquet(self._making) if self.path.suffix == ".parquet" else None
        self._stream = None if self._parquet else self._making.open("w", encoding="utf-8", errors="surrogatepass")
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows += 1
        if self._parquet:
            self._parquet.write(row)
        else:
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def __exit__(self, kind, *_) -> None:
        try:
            (self._parquet or self._stream).close()
        except BaseException:
            self._making.unlink(missing_ok=True)
            raise
        if kind is None:
            self._making.replace(self.path)
        else:
            self._making.unlink(missing_ok=True)


class _Parquet:
    """Row groups of one schema: that of the first rows."""

    def __init__(self, path: pathlib.Path):
        self._path, self._rows, self._writer = path, [], None

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.append(dict(row))
        if len(self._rows) == _TOGETHER:
            self._flush()

    def close(self) -> None:
        if self._rows or self._writer is None:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            schema = None if self._writer is None else self._writer.schema
            unknown = {key for row in self._rows for key in row} - set(schema.names if schema else ())
            if schema is not None and unknown:
                raise pyarrow.ArrowInvalid(f"columns {sorted(unknown)} turn up after the first {_TOGETHER} rows")
            columns = list(dict.fromkeys(key for row in self._rows for key in row))
            rows = [{key: row.get(key) for key in (schema.names if schema else columns)} for row in self._rows]
            table = pyarrow.Table.from_pylist(rows, schema=schema)
            if self._writer is None:
                self._writer = pyarrow.parquet.ParquetWriter(self._path, table.schema)
            self._writer.write_table(table)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as e:
            raise ConfigError(
                f"{self._path.name}: these rows fit no parquet schema ({e}); write .jsonl instead"
            ) from None
        self._rows = []
