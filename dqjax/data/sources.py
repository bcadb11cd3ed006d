"""Where rows come from: jsonl, parquet, `datasets` names, reasoning-gym tasks."""

import dataclasses
import difflib
import glob
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dqjax.config import ConfigError
from dqjax.data.chains import write_chain
from dqjax.data.config import FILE_SUFFIXES, ColumnsConfig, SourceConfig
from dqjax.data.records import BadRow, Record, parse_row

_ARRAY = re.compile(rb"\s*\[\s*(?:[{\]]|$)")  # one array of objects in place of lines, whatever the suffix


@dataclasses.dataclass(frozen=True, slots=True)
class RawRow:
    """A row before it is understood: where it stands, and a decoded row or the bytes of a jsonl line."""

    file: str
    line: int
    value: Mapping[str, Any] | bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A row that could not be used, as the quarantine file shows it."""

    file: str
    line: int
    reason: str


def read_rows(source: SourceConfig) -> Iterator[RawRow]:
    """The rows of a source in its own order.

    Raises:
      ConfigError: a missing or unreadable file, an unknown name, task or task parameter.
    """
    if source.path is not None:
        for file in source_files(source.path):
            yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file)
    elif source.hub is not None:
        for i, row in enumerate(_load_hub(source)):
            yield RawRow(source.hub, i + 1, row)
    else:
        yield from _task_rows(source)


def read_records(source: SourceConfig, columns: ColumnsConfig = ColumnsConfig()) -> Iterator[Record | Rejected]:
    """The records of a source; what cannot be used comes as `Rejected`, in its place."""
    columns = merge_columns(columns, source.columns)
    for raw in read_rows(source):
        yield from records_in(raw, columns, source.label)


def records_in(raw: RawRow, columns: ColumnsConfig, label: str) -> list[Record | Rejected]:
    """The records of a raw row, and what cannot be used of it."""
    try:
        parsed = parse_raw(raw, columns, label)
    except BadRow as bad:
        parsed = [bad]
    return [Rejected(raw.file, raw.line, str(item)) if isinstance(item, BadRow) else item for item in parsed]


def parse_raw(raw: RawRow, columns: ColumnsConfig, label: str) -> list[Record | BadRow]:
    """`parse_row` of a raw row, decoded."""
    return parse_row(decode(raw), columns=columns, source=label)


def decode(raw: RawRow) -> Any:
    """The row itself; raises `BadRow` for a line that is not UTF-8 or not JSON."""
    if not isinstance(raw.value, bytes):
        return raw.value
    try:
        return json.loads(raw.value.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise BadRow(f"not valid UTF-8: {e.reason} at byte {e.start}") from None
    except ValueError as e:
        raise BadRow(f"not valid JSON: {e}") from None
    except RecursionError:
        raise BadRow("not valid JSON: nested too deeply") from None


def merge_columns(base: ColumnsConfig, over: ColumnsConfig) -> ColumnsConfig:
    """`base` with the names that `over` gives."""
    return base.model_copy(update=over.model_dump(exclude_none=True))


def source_files(path: str) -> list[pathlib.Path]:
    """The files of a path, folder or glob, sorted; raises ConfigError where there are none."""
    here = pathlib.Path(path)
    if here.is_dir():
        files = [p for p in here.rglob("*") if p.suffix in FILE_SUFFIXES]
    elif here.exists():
        files = [here]
    else:
        files = [pathlib.Path(p) for p in glob.glob(path, recursive=True)]
    if files:
        return sorted(files)
    siblings = [str(p) for p in here.parent.glob("*")] if here.parent.is_dir() else []
    near = difflib.get_close_matches(path, siblings, 1)
    raise ConfigError(f"no data file at {path}" + (f"; did you mean {near[0]}?" if near else ""))


def fingerprint(source: SourceConfig) -> str:
    """A hash that changes with the rows of the source: of the files' bytes, or of what the name resolves to."""
    digest = hashlib.blake2b(digest_size=16)
    if source.path is not None:
        for file in source_files(source.path):
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    elif source.hub is not None:
        digest.update(_load_hub(source)._fingerprint.encode())
    else:
        plain = source.model_dump(include={"task", "seed", "size", "params", "chain"})
        digest.update(json.dumps([plain, _reasoning_gym().__version__], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _json_rows(file: pathlib.Path) -> Iterator[RawRow]:
    with file.open("rb") as stream:
        if _ARRAY.match(stream.read(64)):
            stream.seek(0)
            try:
                rows = json.load(stream)
            except ValueError as e:
                raise ConfigError(f"{file} is not valid JSON: {e}") from None
            yield from (RawRow(str(file), i + 1, row) for i, row in enumerate(rows))
            return
        stream.seek(0)
        for i, line in enumerate(stream):
            if line.strip():
                yield RawRow(str(file), i + 1, line)


def _parquet_rows(file: pathlib.Path) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        line = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                line += 1
                yield RawRow(str(file), line, row)
    except pyarrow.ArrowInvalid as e:
        raise ConfigError(f"{file} is not a readable parquet file: {e}") from None


def _load_hub(source: SourceConfig) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.hub, source.subset, split=source.split)
    except (FileNotFoundError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"datasets cannot load {source.hub!r} (split {source.split!r}): {reason}") from None


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError("reasoning-gym tasks need an extra package: pip install 'dqjax[tasks]'") from None
    return reasoning_gym


def _task_rows(source: SourceConfig) -> Iterator[RawRow]:
    """The items of a task as rows of the form `answer`, or `messages` where a chain is asked for."""
    gym = _reasoning_gym()
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        near = difflib.get_close_matches(source.task, DATASETS, 1, 0.5)
        raise ConfigError(f"reasoning-gym has no task {source.task!r}" + (f"; did you mean {near[0]}?" if near else ""))
    known = {f.name for f in dataclasses.fields(DATASETS[source.task][1])} - {"seed", "size"}
    for key in source.params.keys() - known:
        near = difflib.get_close_matches(key, known, 1, 0.5)
        raise ConfigError(
            f"task {source.task} has no parameter {key!r}; "
            + (f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}")
        )
    try:
        items = gym.create_dataset(source.task, seed=source.seed, size=source.size, **source.params)
    except (AssertionError, TypeError, ValueError) as e:
        raise ConfigError(f"task {source.task} refuses {source.params}: {e}") from None
    for i in range(source.size):
        item = items[i]
        row = {"id": f"{source.task}-{source.seed + i}", "answer": item["answer"], "metadata": item["metadata"]}
        if source.chain is None:
            row["prompt"] = item["question"]
        else:
            row["messages"] = chain_messages(
                item["question"], item["answer"], item["metadata"]["expression"], source.chain
            )
        yield RawRow(source.label, i + 1, row)


def chain_messages(question: str, answer: str, expression: str, style: str) -> list[dict[str, str]]:
    """The conversation for a `chain_sum` problem: the chain as `reasoning_content`, the bare result as the answer."""
    said = {"role": "assistant", "content": answer}
    chain = write_chain(expression, answer, style)
    if chain is not None:
        said["reasoning_content"] = chain
    return [{"role": "user", "content": question}, said]
