"""Raw rows to token ids, in this process or in several."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from dqjax.data.chat import ChatFormat
from dqjax.data.config import ColumnsConfig, DataConfig, SourceConfig
from dqjax.data.records import BadRow, Record, question_key
from dqjax.data.sources import RawRow, Rejected, read_rows, records_in

_CHUNK = 512  # rows a worker takes at once
_POOL_FROM = 20_000  # rows under which starting processes costs more than it saves


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The documents of some rows, in the rows' order, and the rows that gave none."""

    tokens: np.ndarray
    lengths: np.ndarray
    answer_start: np.ndarray
    difficulty: np.ndarray
    question: np.ndarray
    ids: list[str]
    rejected: list[Rejected]
    rows: int


def turn_mode(record: Record, config: DataConfig) -> str:
    """How the turns of a record are rendered (`ChatFormat.turns`), by `data.thinking` and `data.no_think_share`."""
    if config.thinking == "off":
        return "off"
    if config.no_think_share and _draw(config.seed, record.id) < config.no_think_share:
        return "off"
    if config.thinking == "on":
        return "on"
    return "turn" if record.thinking is None else "on" if record.thinking else "off"


def _draw(seed: int, id: str) -> float:
    """A number in [0, 1) that depends on the seed and the id alone."""
    digest = hashlib.blake2b(f"{seed}\0{id}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def tokenise(config: DataConfig, source: SourceConfig, columns: ColumnsConfig, chat: ChatFormat) -> Iterator[Chunk]:
    """Chunks of tokenised rows in the source's order, from this process or from a pool."""
    work = _ChunkWork(config, columns, source.label, chat)
    rows = iter(tqdm(read_rows(source), f"tokenising {source.label}", unit=" rows", disable=None, mininterval=1.0))
    chunks = iter(lambda: list(itertools.islice(rows, _CHUNK)), [])
    workers = config.workers or min(os.cpu_count() or 1, 16)
    first = list(itertools.islice(chunks, _POOL_FROM // _CHUNK))
    if workers == 1 or len(first) < _POOL_FROM // _CHUNK:
        yield from map(work, itertools.chain(first, chunks))
        return
    # Processes are spawned: a fork of a process that runs jax's threads may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (work,)) as pool:
        yield from _bounded_map(pool, _run_worker, itertools.chain(first, chunks), ahead=2 * workers)


def _bounded_map(pool: concurrent.futures.Executor, do: Callable, items: Iterator, ahead: int) -> Iterator:
    """`pool.map` that keeps at most `ahead` items in flight, so that memory does not grow with the source."""
    futures: list[concurrent.futures.Future] = []
    try:
        for item in items:
            futures.append(pool.submit(do, item))
            if len(futures) >= ahead:
                yield futures.pop(0).result()
        while futures:
            yield futures.pop(0).result()
    finally:
        for future in futures:
            future.cancel()


@dataclasses.dataclass(frozen=True)
class _ChunkWork:
    """Turns raw rows into a `Chunk`; pickled once for each worker."""

    config: DataConfig
    columns: ColumnsConfig
    label: str
    chat: ChatFormat

    def __call__(self, raws: Sequence[RawRow]) -> Chunk:
        rejected, records = [], []
        for raw in raws:
            for item in records_in(raw, self.columns, self.label):
                rejected.append(item) if isinstance(item, Rejected) else records.append((raw, item))
        modes = [turn_mode(record, self.config) for _, record in records]
        turns, owners = [], []
        for (raw, record), made in zip(records, self.chat.turns([record for _, record in records], modes)):
            if isinstance(made, BadRow):
                rejected.append(Rejected(raw.file, raw.line, str(made)))
                continue
            turns += made
            owners += [record] * len(made)
        rejected.sort(key=lambda bad: (bad.file, bad.line))
        return Chunk(
            tokens=np.concatenate([t.ids for t in turns]) if turns else np.zeros(0, np.int32),
            lengths=np.array([len(t.ids) for t in turns], np.int64),
            answer_start=np.array([t.answer_start for t in turns], np.int32),
            difficulty=np.array([np.nan if r.difficulty is None else r.difficulty for r in owners], np.float64),
            question=np.array([question_key(r) for r in owners], np.int64),
            ids=[t.id for t in turns],
            rejected=rejected,
            rows=len(raws),
        )


_worker: _ChunkWork | None = None


def _start_worker(work: _ChunkWork) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = work


def _run_worker(raws: Sequence[RawRow]) -> Chunk:
    return _worker(raws)
