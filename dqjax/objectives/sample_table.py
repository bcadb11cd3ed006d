"""The samples of a run as a file to be browsed: one JSON line each."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any


class SampleTable:
    """A file of rows that name their step; without a path, nothing is written.

    A resumed run first drops the rows of the steps that it is about to take again.
    """

    def __init__(self, path: pathlib.Path | None):
        self._path, self._rewound = path, False

    def write(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends the rows of one step."""
        if self._path is None:
            return
        if not self._rewound:
            self._rewind(self._path, step)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)

    def _rewind(self, path: pathlib.Path, step: int) -> None:
        self._rewound = True
        if not path.exists():
            return
        temporary = path.with_suffix(".tmp")
        with path.open(encoding="utf-8") as before, temporary.open("w", encoding="utf-8") as after:
            for line in before:
                if not line.endswith("\n") or json.loads(line)["step"] >= step:  # a line cut short by a kill is the last
                    break
                after.write(line)
        temporary.rename(path)
