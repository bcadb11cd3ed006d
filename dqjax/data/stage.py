"""What all stages share: rows in and out, shards, journals, and the order of answers.

A stage is a module with `HELP`, a `Config`, and `run(config, job)`. It maps the rows of one problem (they stand
together) to rows and `Rejection`s; the `Job` does the rest:

    OUT.jsonl             the rows, in the order of the input; complete or not there
    OUT.rejected.jsonl    each row that did not get through, with its reason
    OUT.counts.json       what was counted, the settings, and a fingerprint of the inputs
    OUT.journal.jsonl     the teachers' answers, for stages that ask (see `journal`)

Killed at any moment and run again, a stage reads its input anew, finds in the journal what was answered, and asks the
rest.
"""

import asyncio
import collections
import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import pathlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from dqjax.config import ConfigError, Section
from dqjax.data.chain_rows import Row, read_chain_rows
from dqjax.data.config import SourceConfig
from dqjax.data.grouping import problems, runs
from dqjax.data.sources import Rejected, fingerprint
from dqjax.data.staff import Staff
from dqjax.data.teacher import CallFailed, Teacher
from dqjax.data.writing import RowWriter

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """A row that goes no further. `failed`: not for what it says, but for want of a usable answer to a call."""

    id: str
    problem_id: str
    reason: str
    failed: bool = False


Out = Row | Rejection
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `count`: a run of consecutive problems, so that the parts in order make the whole."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `i/n`, i from 0; raises ConfigError."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ConfigError(f"--shard {text}: expected i/n with 0 <= i < n, such as 0/4")
        return cls(int(index), int(count))

    def bounds(self, rows: int) -> tuple[int, int]:
        """Rows whose problems begin in [low, high) are this shard's."""
        return rows * self.index // self.count, rows * (self.index + 1) // self.count

    def path(self, output: pathlib.Path) -> pathlib.Path:
        """Where the part's rows go."""
        return output.with_name(f"{output.stem}.shard-{self.index}-of-{self.count}{output.suffix}")


class Stage(Protocol):
    """A stage's module."""

    HELP: str
    Config: type[Section]

    def run(self, config: Any, job: "Job") -> None: ...


class Job:
    """One run of one stage.

    Args:
      name: the step's name. inputs: jsonl or parquet files, folders, globs. output: a jsonl or parquet path.
      staff: makes the teachers that the stage names.
      limit: only so many rows of the input.

    Attributes:
      journal_path: where the teachers' answers are.
      counts: rows in, out, rejected by reason, and whatever the stage counts itself.
      usage: calls, tokens and seconds by teacher.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        output: str | pathlib.Path,
        *,
        staff: Staff,
        settings: Section,
        shard: Shard | None = None,
        limit: int | None = None,
    ):
        self.name, self.inputs, self.staff, self.shard, self.limit = name, inputs, staff, shard, limit
        whole = pathlib.Path(output)
        self.output = shard.path(whole) if shard else whole
        self.counts: Counter[str] = Counter()
        self.usage: Counter[str] = Counter()
        self.settings = settings.model_dump(mode="json")
        self.journal_path = self.output.with_name(f"{self.output.stem}.journal.jsonl")
        self._unread = True
        self._writer: RowWriter | None = None
        self._rejected: RowWriter | None = None

    @property
    def stamp(self) -> str:
        """A hash of all that decides the output: settings, inputs, the part."""
        digest = hashlib.blake2b(digest_size=16)
        settled = [self.name, self.settings, dataclasses.astuple(self.shard) if self.shard else None, self.limit]
        digest.update(json.dumps([*settled, self.staff.identities()], sort_keys=True, default=str).encode())
        for path in self.inputs:
            digest.update(fingerprint(SourceConfig(path=path)).encode())
        return digest.hexdigest()

    def groups(self, *, whole: bool = False) -> Iterator[list[Row]]:
        """The rows of this shard, one list a problem, in the order in which the problems begin.

        Args:
          whole: a problem's rows are brought together wherever they stand; otherwise neighbours make a group.
        """
        low, high = 0, None
        if self.shard is not None:
            low, high = self.shard.bounds(sum(1 for _ in self._read()))
        at = 0
        for group in problems(self._read) if whole else runs(self._read()):
            if high is not None and at >= high:
                return
            if low <= at:
                self.counts["in"] += len(group)
                yield group
            at += len(group)

    def map(self, transform: Callable[[list[Row]], Iterable[Out]]) -> None:
        """Applies a function to all rows of each problem."""
        with self._writing():
            for group in self._bar(self.groups(whole=True)):
                self._emit(transform(group))

    def map_batches(self, transform: Callable[[list[Row]], Iterable[Out]], size: int = 256) -> None:
        """Applies a function to some rows at a time, for stages that look at each row alone."""
        with self._writing():
            batch: list[Row] = []
            for group in self._bar(self.groups()):
                batch += group
                if len(batch) >= size:
                    self._emit(transform(batch))
                    batch = []
            if batch:
                self._emit(transform(batch))

    def map_async(self, transform: Callable[[list[Row]], Awaitable[Iterable[Out]]], teachers: Sequence[str]) -> None:
        """Applies a coroutine function to the rows of each problem, many problems at a time, and keeps their order.

        Args:
          teachers: names of those that `transform` asks; they are open while it runs (`Job.teacher`).
        """

        async def main() -> None:
            shards = self.shard.count if self.shard else 1
            async with self.staff.at_work(teachers, self.journal_path, usage=self.usage, shards=shards) as parallel:
                # Answers come out of order: with room for eight times as many problems as calls, one slow answer at the
                # head does not leave the endpoints idle.
                await self._map_ordered(transform, 8 * parallel)

        with self._writing(), _rare_collections(), asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(main())

    def refuse_shard(self, what: str) -> None:
        """For stages that look at all rows; raises ConfigError where this job is a part."""
        if self.shard is not None:
            raise ConfigError(f"{what} looks at all rows: run it without --shard, after a merge")

    def teacher(self, name: str) -> Teacher:
        """A teacher that is at work."""
        return self.staff.teacher(name)

    def count_rows(self) -> int:
        """Usable rows of all inputs, whatever `limit` says."""
        return sum(
            not isinstance(row, Rejected) for path in self.inputs for row in read_chain_rows(SourceConfig(path=path))
        )

    async def _map_ordered(self, transform: Callable[[list[Row]], Awaitable[Iterable[Out]]], width: int) -> None:
        pending: collections.deque[asyncio.Task] = collections.deque()
        try:
            for i, group in enumerate(self._bar(self.groups())):
                pending.append(asyncio.create_task(transform(group)))
                if i % 16 == 0:
                    await asyncio.sleep(0)  # hundreds of rows at once would keep answers waiting
                while pending and (len(pending) >= width or pending[0].done()):
                    self._emit(await pending[0])
                    pending.popleft()
            while pending:
                self._emit(await pending[0])
                pending.popleft()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def _read(self) -> Iterator[Row]:
        """The usable rows of all inputs. The others are reported once, by the first shard."""
        report = self._unread and (self.shard is None or self.shard.index == 0)
        self._unread = False
        rows = 0
        for path in self.inputs:
            for row in read_chain_rows(SourceConfig(path=path)):
                if isinstance(row, Rejected):
                    if report:
                        place = f"{row.file}:{row.line}"
                        self._emit([Rejection(place, place, f"unusable row: {row.reason}")])
                    continue
                if rows == self.limit:
                    return
                rows += 1
                yield row

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Opens the outputs; they get their names when the block ends without an error."""
        rejected = self.output.with_name(f"{self.output.stem}.rejected.jsonl")
        with RowWriter(rejected) as self._rejected, RowWriter(self.output) as self._writer:
            yield
        self.write_counts()

    def write_counts(self) -> None:
        """OUT.counts.json, the mark of a complete output."""
        counts = self.output.with_name(f"{self.output.stem}.counts.json")
        said = {"step": self.name, "stamp": self.stamp, "settings": self.settings, "counts": dict(self.counts)}
        said["usage"] = dict(self.usage)
        counts.write_text(json.dumps(said, indent=1) + "\n")

    def _emit(self, outs: Iterable[Out]) -> None:
        for out in outs:
            if isinstance(out, Rejection):
                self.counts["failed" if out.failed else "rejected"] += 1
                self.counts[f"reason: {_short(out.reason)}"] += 1
                self._rejected.write({"stage": self.name, **dataclasses.asdict(out)})
            else:
                self.counts["out"] += 1
                self._writer.write(out)

    def _bar(self, groups: Iterable[list[Row]]) -> Iterable[list[Row]]:
        return tqdm(groups, self.name, unit=" problems", disable=None, mininterval=1.0)


async def together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The results of all calls, made at the same time; one alone needs no task of its own."""
    calls = list(calls)
    return [await calls[0]] if len(calls) == 1 else await asyncio.gather(*calls)


def rejection(row: Row, reason: str, *, failed: bool = False) -> Rejection:
    """The row as a `Rejection`."""
    return Rejection(row["id"], row["problem_id"], reason, failed)


def failure(row: Row, failed: CallFailed, id: str | None = None) -> Rejection:
    """The rejection of a row whose call got no usable answer."""
    return Rejection(id or row["id"], row["problem_id"], str(failed), True)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Thousands of waiting tasks are many objects to trace, and no garbage: a fifth of the CPU a call without this."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed (orbax brings it along): a third less CPU a call."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _short(reason: str) -> str:
    """A reason without its particulars, so that it can be counted."""
    return reason.partition(" (attempt")[0].partition(": ")[0][:80]
