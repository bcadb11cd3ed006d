"""Work on chunks of a stream, in this process or in several; results come in order and memory stays bounded."""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_POOL_FROM = 8  # chunks under which starting processes costs more than it saves


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items."""
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def map_chunks(
    work: Callable[[list[T]], Any], items: Iterable[T], *, size: int = 1024, workers: int | None = None
) -> Iterator[Any]:
    """`work` of each chunk of `items`, in order; `work` is pickled once for each process.

    Args:
      workers: processes; by default the machine's cores, at most 16. 1 stays in this process.
    """
    parts = chunks(items, size)
    workers = workers or min(os.cpu_count() or 1, 16)
    first = list(itertools.islice(parts, _POOL_FROM))
    if workers == 1 or len(first) < _POOL_FROM:
        yield from map(work, itertools.chain(first, parts))
        return
    # Processes are spawned: a fork of a process that runs jax's threads may hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _set_work, (work,)) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for part in itertools.chain(first, parts):
                waiting.append(pool.submit(_do_work, part))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


_work: Callable[[list], Any] | None = None


def _set_work(work: Callable[[list], Any]) -> None:
    global _work
    _work = work


def _do_work(part: list) -> Any:
    return _work(part)
