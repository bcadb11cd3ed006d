"""An append-only file of answers: what is in it was answered, whatever happens to the process.

Each line is one answer, `{"key": "<32 hex digits>", "tokens": <spent>, "reply": {...}}`. A line is handed to the
operating system before its answer counts, so a killed process loses nothing; it is forced to the disk at most
`fsync_seconds` later, so a machine that loses power loses at most the answers of that time. A line torn by a crash is
cut off when the journal is opened again.
"""

import fcntl
import json
import os
import pathlib
import re
import time
from typing import Any

from dqjax.config import ConfigError

_HEAD = re.compile(rb'\{"key": "([0-9a-f]{32}|)", "tokens": (\d+), ')


class Journal:
    """Answers by key, kept in one jsonl file; memory grows by some 150 bytes an answer, not by the answers.

    Args:
      fsync_seconds: the longest time between writing a line and forcing it to the disk; 0 forces every line.

    Attributes:
      spent: tokens of all answers, and of calls that were charged without one.

    Raises:
      ConfigError: another process writes to the same file, or it is no journal.
    """

    def __init__(self, path: str | pathlib.Path, fsync_seconds: float = 1.0):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"{self.path} is being written by another process; wait for it, or use --shard") from None
        self._fsync_seconds, self._synced = fsync_seconds, time.monotonic()
        self._offsets: dict[int, int] = {}
        self.spent = 0
        self._end = 0
        self._load()

    def __len__(self) -> int:
        return len(self._offsets)

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply of a key; None where it has not been answered."""
        offset = self._offsets.get(_short(key))
        if offset is None:
            return None
        line = b""
        while not line.endswith(b"\n"):
            line += os.pread(self._file.fileno(), 1 << 16, offset + len(line))
            line = line[: line.index(b"\n") + 1] if b"\n" in line else line
        row = json.loads(line)
        return row["reply"] if row["key"] == key else None

    def put(self, key: str, tokens: int, reply: dict[str, Any]) -> None:
        """Writes an answer; it is the operating system's when this returns."""
        self._offsets[_short(key)] = self._end
        self._append({"key": key, "tokens": tokens, "reply": reply})

    def charge(self, tokens: int) -> None:
        """Writes down a call that may have been billed without an answer."""
        self._append({"key": "", "tokens": tokens, "reply": None})

    def close(self) -> None:
        """Forces everything to the disk and lets other processes write."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written; is the disk full?")
        self._end += len(line)
        self.spent += row["tokens"]
        now = time.monotonic()
        if now - self._synced >= self._fsync_seconds:
            os.fsync(self._file.fileno())
            self._synced = now

    def _load(self) -> None:
        with self.path.open("rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # torn
                head = _HEAD.match(line)
                if head is None:
                    raise ConfigError(f"{self.path} holds a line that no journal has, at byte {self._end}")
                if head[1]:
                    self._offsets[_short(head[1].decode())] = self._end
                self.spent += int(head[2])
                self._end += len(line)
        if self._end != self.path.stat().st_size:
            os.truncate(self.path, self._end)


def _short(key: str) -> int:
    """63 bits of a key; `get` compares the whole one."""
    return int(key[:16], 16) >> 1


def tokens_in(path: pathlib.Path) -> int:
    """Tokens spent by the calls of a journal that another job has written."""
    with path.open("rb") as stream:
        return sum(int(head[2]) for line in stream if (head := _HEAD.match(line)))
