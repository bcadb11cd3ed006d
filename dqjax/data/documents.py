"""Sources tokenised once and kept on disk, as flat arrays that are mapped into memory.

An entry of the cache is a folder named by a hash of everything that it depends on: the tokenizer, its template, the
bytes of the data, the settings and this module's `FORMAT`. It is written under a temporary name and renamed, so an
entry that exists is whole, whoever was killed meanwhile, and two writers of one entry do not disturb each other.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat
from dqjax.data.config import ColumnsConfig, DataConfig, SourceConfig
from dqjax.data.sources import Rejected, fingerprint, merge_columns
from dqjax.data.tokenise import tokenise

log = logging.getLogger(__name__)

FORMAT = 2  # raise when the arrays, the parsing or the rendering change: old entries are then no longer found
_ARRAYS = ("start", "lengths", "answer_start", "difficulty", "question")


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Tokenised documents of one or several sources.

    Attributes:
      tokens: for each source a flat array, mapped from the cache.
      start: where in its source's tokens a document begins.
      lengths: its tokens.
      answer_start: tokens before it are the prompt.
      difficulty: NaN where unknown.
      question: `question_key`, equal for documents of the same problem.
      source: index into `sources`.
      ids: the stable id of each document.
      sources: labels.
    """

    tokens: tuple[Int32[np.ndarray, " tokens"], ...]
    start: Int64[np.ndarray, " D"]
    lengths: Int64[np.ndarray, " D"]
    answer_start: Int32[np.ndarray, " D"]
    difficulty: Float64[np.ndarray, " D"]
    question: Int64[np.ndarray, " D"]
    source: Int32[np.ndarray, " D"]
    ids: Sequence[str]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.answer_start)

    def ids_of(self, document: int) -> Int32[np.ndarray, " n"]:
        """The token ids of a document."""
        start = self.start[document]
        return np.asarray(self.tokens[self.source[document]][start : start + self.lengths[document]])

    def take(self, numbers: Int[np.ndarray, " some"]) -> "Documents":
        """These documents alone, numbered anew; their tokens are not copied."""
        arrays = {name: getattr(self, name)[numbers] for name in (*_ARRAYS, "source")}
        return dataclasses.replace(self, **arrays, ids=[self.ids[n] for n in numbers.tolist()])

    def prompt(self, document: int) -> Int32[np.ndarray, " n"]:
        """The token ids of a document's prompt."""
        return self.ids_of(document)[: self.answer_start[document]]


def load_documents(config: DataConfig, sources: Sequence[SourceConfig], chat: ChatFormat) -> Documents:
    """The documents of `sources`, from the cache or tokenised now.

    Raises:
      ConfigError: a source cannot be read, more than `max_bad_share` of the rows are unusable, or none is left.
    """
    root = cache_root(config.cache_dir)
    parts, rejected, rows = [], [], 0
    for source in sources:
        part, meta, bad = _load_source(config, source, chat, root)
        parts.append(part)
        rejected += bad
        rows += meta["rows"]
    write_rejected(rejected, rows, max_share=config.max_bad_share, path=config.quarantine)
    if not any(map(len, parts)):
        raise ConfigError(f"data: no document in {', '.join(s.label for s in sources)}")
    documents = _join(parts)
    if (doubled := len(documents) - len(set(documents.ids))) > 0:
        log.warning("%d of %d documents share their id with another one", doubled, len(documents))
    return documents


def cache_root(folder: str | None) -> pathlib.Path:
    """`data.cache_dir`, or its default under the user's cache folder."""
    if folder is not None:
        return pathlib.Path(folder)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dqjax" / "data"


def write_rejected(rejected: Sequence[Rejected], rows: int, *, max_share: float, path: str | None) -> None:
    """Writes the quarantine file, warns about unusable rows, and raises ConfigError where they are too many."""
    if path is not None:
        target = pathlib.Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(target) as stream:
            stream.writelines(json.dumps(dataclasses.asdict(bad), ensure_ascii=False) + "\n" for bad in rejected)
    if not rejected:
        return
    where = f"all are in {path}" if path else "set data.quarantine to a file to see them all"
    first = rejected[0]
    said = (
        f"{len(rejected)} of {rows} rows are unusable, the first at {first.file}:{first.line}: {first.reason}; {where}"
    )
    if len(rejected) > max_share * rows:
        raise ConfigError(f"{said}. More than data.max_bad_share = {max_share:g} of them")
    log.warning("%s", said)


def _load_source(
    config: DataConfig, source: SourceConfig, chat: ChatFormat, root: pathlib.Path
) -> tuple[Documents, dict[str, Any], list[Rejected]]:
    columns = merge_columns(config.columns, source.columns)
    if config.curriculum is not None and config.curriculum.column is not None:
        columns = columns.model_copy(update={"difficulty": config.curriculum.column})
    entry = root / _key(config, source, columns, chat)
    if entry.exists():
        try:
            return _read_entry(entry, source.label)
        except (OSError, ValueError, KeyError, TypeError) as e:
            log.warning("the cached documents in %s are damaged (%s); tokenising again", entry, e)
            shutil.rmtree(entry)
    _write_entry(entry, config, source, columns, chat)
    return _read_entry(entry, source.label)


def _read_entry(entry: pathlib.Path, label: str) -> tuple[Documents, dict[str, Any], list[Rejected]]:
    """Raises one of the errors above where a file is missing or cut short."""
    meta = json.loads((entry / "meta.json").read_text())
    with (entry / "rejected.jsonl").open(encoding="utf-8") as stream:
        rejected = [Rejected(**json.loads(line)) for line in stream]
    arrays = {name: np.load(entry / f"{name}.npy") for name in _ARRAYS}
    tokens = np.load(entry / "tokens.npy", mmap_mode="r" if meta["tokens"] else None)
    ids = json.loads((entry / "ids.json").read_text(encoding="utf-8"))
    found = {len(ids), *map(len, arrays.values())}
    if found != {meta["documents"]} or len(tokens) != meta["tokens"] or arrays["lengths"].sum() != meta["tokens"]:
        raise ValueError("its files disagree about their lengths")
    part = Documents(**arrays, tokens=(tokens,), source=np.zeros(len(ids), np.int32), ids=ids, sources=(label,))
    return part, meta, rejected


def _key(config: DataConfig, source: SourceConfig, columns: ColumnsConfig, chat: ChatFormat) -> str:
    settings = [
        FORMAT,
        fingerprint(source),
        source.label,
        columns.model_dump(),
        config.model_dump(include={"thinking", "no_think_share", "seed"} if config.no_think_share else {"thinking"}),
        _tokenizer_text(chat.tokenizer),
        chat.tokenizer.chat_template,
    ]
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tokenizer_text(tokenizer: Any) -> str:
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return backend.to_str()
    return f"{type(tokenizer).__name__} {json.dumps(tokenizer.get_vocab(), sort_keys=True)}"  # sentencepiece


def _write_entry(
    entry: pathlib.Path, config: DataConfig, source: SourceConfig, columns: ColumnsConfig, chat: ChatFormat
) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    _sweep(entry.parent)
    making = pathlib.Path(tempfile.mkdtemp(prefix=".making-", dir=entry.parent))
    try:
        lengths, starts, difficulty, question, ids, rejected, rows = [], [], [], [], [], [], 0
        with (making / "tokens.raw").open("wb") as raw:
            for chunk in tokenise(config, source, columns, chat):
                raw.write(chunk.tokens.tobytes())
                lengths.append(chunk.lengths)
                starts.append(chunk.answer_start)
                difficulty.append(chunk.difficulty)
                question.append(chunk.question)
                ids += chunk.ids
                rejected += chunk.rejected
                rows += chunk.rows
        arrays = {
            "lengths": np.concatenate([*lengths, np.zeros(0, np.int64)]),
            "answer_start": np.concatenate([*starts, np.zeros(0, np.int32)]),
            "difficulty": np.concatenate([*difficulty, np.zeros(0)]),
            "question": np.concatenate([*question, np.zeros(0, np.int64)]),
        }
        ends = np.cumsum(arrays["lengths"])
        arrays["start"] = ends - arrays["lengths"]
        for name, array in arrays.items():
            np.save(making / f"{name}.npy", array)
        count = int(ends[-1]) if ids else 0
        _raw_to_npy(making / "tokens.raw", making / "tokens.npy", count)
        (making / "ids.json").write_text(json.dumps(ids), encoding="utf-8")
        with (making / "rejected.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(dataclasses.asdict(bad)) + "\n" for bad in rejected)
        (making / "meta.json").write_text(json.dumps({"rows": rows, "documents": len(ids), "tokens": count}))
        try:
            making.rename(entry)
        except OSError:
            if not entry.exists():  # else another process finished the same entry first: its copy is as good
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _raw_to_npy(raw: pathlib.Path, target: pathlib.Path, count: int) -> None:
    if not count:  # an empty file cannot be mapped
        np.save(target, np.zeros(0, np.int32))
    else:
        source = np.memmap(raw, np.int32, "r", shape=(count,))
        mapped = np.lib.format.open_memmap(target, "w+", np.int32, (count,))
        for start in range(0, count, 1 << 24):
            mapped[start : start + (1 << 24)] = source[start : start + (1 << 24)]
        mapped.flush()
    raw.unlink()


def _sweep(root: pathlib.Path) -> None:
    """Removes what killed writers left behind more than a day ago."""
    for left in root.glob(".making-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[Any]:
    """A text file that appears under its name only when it is complete."""
    making = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with making.open("w", encoding="utf-8") as stream:
            yield stream
        making.replace(path)
    finally:
        making.unlink(missing_ok=True)


def _join(parts: Sequence[Documents]) -> Documents:
    if len(parts) == 1:
        return parts[0]
    joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in _ARRAYS}
    return Documents(
        **joined,
        tokens=tuple(tokens for p in parts for tokens in p.tokens),
        source=np.repeat(np.arange(len(parts), dtype=np.int32), [len(p) for p in parts]),
        ids=[id for p in parts for id in p.ids],
        sources=tuple(label for p in parts for label in p.sources),
    )
