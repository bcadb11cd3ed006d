"""The training source: packed rows in a seeded order, with one counter as their whole state.

The documents are packed once; row r of epoch e is a pure function of (seed, e, r). A batch is the next B rows of that
endless sequence, whoever asks for it, so the state is (epoch, next_row) and means the same on any number of hosts: each
builds the rows at its own positions of the global batch, and knows the global count of trained tokens from the plan.

    epoch       0            1            2       ...
    rows        3 0 2 1 4    1 4 0 3 2    2 0 ...           permuted by (seed, epoch)
    batches     ----- ----- ------- ----- ...               B = 2: a batch may take rows of two epochs
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat
from dqjax.data.config import DataConfig, StageConfig
from dqjax.data.documents import Documents, load_documents
from dqjax.data.pack import Reduction, Tokens, pack_rows
from dqjax.data.rows import PackedRows, TokenValues, plan_rows
from dqjax.data.split import in_stage, split
from dqjax.types import Batch

log = logging.getLogger(__name__)

_ENDLESS = 1 << 40  # batches of a run without an end, as a length that grain can take


@dataclasses.dataclass(frozen=True)
class Stage:
    """Rows that are passed over `epochs` times; None: without end."""

    rows: PackedRows
    epochs: int | None


class Loader:
    """A `Source` of training batches (DESIGN.md, section 3), of numpy arrays.

    Batches are built ahead by grain's threads, at most `prefetch` of them. Past the last epoch of the last stage the
    final batch is filled up with empty rows, and then `next` raises StopIteration.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        batch_rows: int,
        seed: int,
        local_rows: Sequence[int] | None = None,
        reduction: Reduction = "token_mean",
        prefetch: int = 4,
        pad_id: int = 0,
    ):
        """Args:
          batch_rows: B, rows of the global batch.
          local_rows: positions in the global batch which this process supplies, in this order; by default all.
          reduction: how `token_weight` is normalised, always over the global batch.

        Raises:
          ValueError: no rows at all, or a local row outside the batch.
        """
        self.stages, self.batch_rows, self.seed = list(stages), batch_rows, seed
        self.local_rows = list(range(batch_rows) if local_rows is None else local_rows)
        if not stages or not all(len(s.rows) for s in stages):
            raise ValueError("every stage needs at least one row")
        if any(s.epochs is None for s in stages[:-1]):
            raise ValueError("only the last stage may go on without end")
        if any(not 0 <= i < batch_rows for i in self.local_rows):
            raise ValueError(f"local_rows: expected positions from 0 to {batch_rows - 1}, got {self.local_rows}")
        self.row_length = stages[0].rows.row_length
        self.columns = max(s.rows.plan.columns for s in stages)
        self._reduction: Reduction = reduction
        self._prefetch, self._pad_id = prefetch, pad_id
        self._position = 0  # rows consumed since the start of training
        self._batches: Any = None
        self._order = functools.lru_cache(maxsize=4)(self._make_order)  # a batch may span epochs

    @property
    def total_rows(self) -> int | None:
        """Rows until the end of the last stage; None: there is no end."""
        if self.stages[-1].epochs is None:
            return None
        return sum(len(s.rows) * s.epochs for s in self.stages)

    @property
    def total_batches(self) -> int | None:
        """Batches until the end of the last stage; None: there is no end."""
        return None if self.total_rows is None else -(-self.total_rows // self.batch_rows)

    def batches_of(self, epochs: int) -> int:
        """Batches that cover the first `epochs` epochs."""
        return -(-self._rows_before(epochs) // self.batch_rows)

    def next(self, state: Any = None, frozen: Any = None) -> Batch:
        """The next batch, of the rows at `local_rows`; the arguments are for sources that sample from the model.

        Raises:
          StopIteration: the last stage is over.
        """
        if self._batches is None:
            left = _ENDLESS if self.total_rows is None else -(-(self.total_rows - self._position) // self.batch_rows)
            if left <= 0:
                raise StopIteration
            options = grain.ReadOptions(num_threads=min(2, self._prefetch), prefetch_buffer_size=self._prefetch)
            ahead = grain.MapDataset.source(_Batches(self, self._position, left)).to_iter_dataset(options)
            self._batches = iter(ahead)
        batch = next(self._batches)
        self._position += self.batch_rows
        return batch

    def get_state(self) -> dict[str, int]:
        """Where the next batch begins: the same on every host, and good for any number of them."""
        epoch, row = self._locate(self._position)
        return {"epoch": epoch, "next_row": row}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to a place that `get_state` named, also one of a loader with another batch size or number of hosts.

        Raises:
          ValueError: no such row: the data are not those that the state speaks of.
        """
        epoch, row = int(state["epoch"]), int(state["next_row"])
        rows = len(self._stage_of(epoch).rows) if epoch < self._epochs else 0
        if epoch < 0 or not 0 <= row <= rows:
            raise ValueError(f"state {dict(state)}: epoch {epoch} has {rows} rows; was it saved with other data?")
        self.close()
        self._position = self._rows_before(epoch) + row

    def close(self) -> None:
        """Stops the threads; `next` starts them again where it left off."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def batch_at(self, position: int) -> Batch:
        """The batch whose first row is number `position` since the start of training."""
        stop = position + self.batch_rows
        if self.total_rows is not None:
            stop = min(stop, self.total_rows)
        places = [self._locate(p) for p in range(position, stop)]
        found = [(self._stage_of(epoch).rows, self._shuffled(epoch, r)) for epoch, r in places]
        totals = (
            int(sum(rows.trained_tokens[r] for rows, r in found)),
            int(sum(rows.trained_sequences[r] for rows, r in found)),
        )
        local = [found[i][0].row(found[i][1]) if i < len(found) else [] for i in self.local_rows]
        return pack_rows(
            local,
            self.row_length,
            columns=self.columns,
            reduction=self._reduction,
            totals=totals,
            pad_id=self._pad_id,
            like=self._like,
        )

    @functools.cached_property
    def _like(self) -> Sequence[Tokens]:
        return self.stages[0].rows.row(0)

    @property
    def _epochs(self) -> float:
        return float("inf") if self.stages[-1].epochs is None else sum(s.epochs for s in self.stages)

    def _stage_of(self, epoch: int) -> Stage:
        for stage in self.stages[:-1]:
            if epoch < stage.epochs:
                return stage
            epoch -= stage.epochs
        return self.stages[-1]

    def _rows_before(self, epoch: int) -> int:
        rows = 0
        for stage in self.stages:
            here = epoch if stage.epochs is None else min(epoch, stage.epochs)
            rows += here * len(stage.rows)
            epoch -= here
        return rows

    def _locate(self, position: int) -> tuple[int, int]:
        """(epoch, row in its order) of a row counted from the start of training."""
        epoch = 0
        for stage in self.stages:
            passes, row = divmod(position, len(stage.rows))
            if stage.epochs is None or passes < stage.epochs:
                return epoch + passes, row
            epoch += stage.epochs
            position -= stage.epochs * len(stage.rows)
        return epoch, 0

    def _shuffled(self, epoch: int, r: int) -> int:
        """The plan's row at place r of an epoch: grain's permutation, which needs no table."""
        return int(self._order(epoch)[r])

    def _make_order(self, epoch: int) -> grain.MapDataset:
        seed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        return grain.MapDataset.range(len(self._stage_of(epoch).rows)).shuffle(seed=seed)


class _Batches:
    """grain's view of a loader: batch i after a starting row."""

    def __init__(self, loader: Loader, position: int, count: int):
        self._loader, self._position, self._count = loader, position, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Batch:
        return self._loader.batch_at(self._position + i * self._loader.batch_rows)


class Evaluation:
    """Held-out rows in a fixed order; iterating yields batches, the last filled up with empty rows.

    `documents` are the held-out ones; the side value `row` numbers them.

    `token_weight` is normalised over the whole set: weighted sums of its batches add up to the mean over its tokens.
    """

    def __init__(self, rows: PackedRows, *, batch_rows: int, local_rows: Sequence[int] | None = None, pad_id: int = 0):
        self.rows, self.batch_rows = rows, batch_rows
        self.local_rows = list(range(batch_rows) if local_rows is None else local_rows)
        self.documents = rows.documents
        self._pad_id = pad_id

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        rows = self.rows
        totals = int(rows.trained_tokens.sum()), int(rows.trained_sequences.sum())
        for first in range(0, len(rows), self.batch_rows):
            local = [rows.row(first + i) if first + i < len(rows) else [] for i in self.local_rows]
            yield pack_rows(
                local,
                rows.row_length,
                columns=rows.plan.columns,
                totals=totals,
                pad_id=self._pad_id,
                like=() if any(local) else rows.row(0),
            )


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a training run reads.

    Attributes:
      loader: the training batches.
      validation: held-out batches; None without `data.validation`.
      documents: of the training rows; side value `row` numbers them, `documents.ids` names them.
      sources: label of each side value `source`.
      counts: documents kept, dropped and held out, for the run's log.
    """

    loader: Loader
    validation: Evaluation | None
    documents: Documents
    sources: tuple[str, ...]
    counts: Mapping[str, int]

    @property
    def row_sets(self) -> list[PackedRows]:
        """All rows: those of each stage, and the held-out ones."""
        return [stage.rows for stage in self.loader.stages] + ([self.validation.rows] if self.validation else [])


def open_training_data(
    config: DataConfig,
    tokenizer: Any,
    *,
    batch_rows: int,
    local_rows: Sequence[int] | None = None,
    reduction: Reduction = "token_mean",
    token_values: TokenValues | None = None,
) -> TrainingData:
    """Reads, tokenises (or finds in the cache), splits, packs and orders what a `data:` section names.

    Args:
      tokenizer: from `dqjax.data.tokenizer.load_tokenizer`.
      batch_rows: B, rows of the global batch.
      local_rows: positions in it that this process supplies; by default all.
      token_values: see `PackedRows`.

    Raises:
      ConfigError: data that cannot be read or leave nothing to train on.
    """
    chat = ChatFormat.of(tokenizer)
    documents = load_documents(config, config.sources, chat)
    train, held, counts = split(config, documents, lambda config, sources: load_documents(config, sources, chat))
    options = {
        "row_length": config.row_length,
        "too_long": config.too_long,
        "train_on_prompt": config.train_on_prompt,
        "token_values": token_values,
    }
    stages, too_long, packed = [], 0, 0
    unused = np.ones(len(train), bool)
    wanted = config.curriculum.stages if config.curriculum is not None else (StageConfig(),)
    for i, stage in enumerate(wanted):
        inside = in_stage(stage, documents.difficulty[train])
        chosen, unused = train[inside], unused & ~inside
        rows, long = plan_rows(documents, chosen, stage=i, **options)
        if not len(rows):
            raise ConfigError(
                f"data: curriculum stage {i} ({stage.at_least} to {stage.below}) has no document to train on"
            )
        stages.append(Stage(rows, stage.epochs if config.curriculum is not None else None))
        too_long, packed = too_long + long, packed + len(chosen)
    if unused.any():
        log.warning("%d of %d documents are in no stage of the curriculum", unused.sum(), len(train))
    share = too_long / packed
    if too_long:
        done = {"drop": "dropped", "truncate": "cut", "split": "split"}[config.too_long]
        said = f"{too_long} of {packed} documents ({share:.1%}) are over data.row_length = {config.row_length}"
        (log.warning if share > 0.05 else log.info)("%s and were %s", said, done)
    placing = {"batch_rows": batch_rows, "local_rows": local_rows, "pad_id": tokenizer.pad_token_id}
    loader = Loader(stages, seed=config.seed, reduction=reduction, prefetch=config.prefetch, **placing)
    validation = None
    if held is not None:
        rows, _ = plan_rows(held, np.arange(len(held)), **options)
        if not len(rows):
            raise ConfigError("data.validation: no held-out document fits into a row")
        validation = Evaluation(rows, **placing)
    counts |= {"documents": packed, "rows": sum(len(s.rows) for s in stages), "too_long": too_long}
    return TrainingData(loader, validation, documents, documents.sources, counts)
