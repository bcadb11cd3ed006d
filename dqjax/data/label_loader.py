"""The training source of scorers: whole conversations with judge labels, packed, in a seeded order.

    verbosity, difficulty                   the label, 0 … 9; -1 where it is missing
    verbosity_weight, difficulty_weight     1 / labels of that name in the global batch; 0 where it is missing

Order and state are those of `data.loader`.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from dqjax.config import ConfigError
from dqjax.data.chain_rows import DIFFICULTY, VERBOSITY, label_of
from dqjax.data.chat import ChatFormat
from dqjax.data.config import DataConfig, SourceConfig
from dqjax.data.documents import write_rejected
from dqjax.data.loader import Loader, Stage
from dqjax.data.pack import RowPlan, Tokens, best_fit_decreasing, pack_rows
from dqjax.data.pair_loader import closing_ids
from dqjax.data.records import BadRow, Record, question_key
from dqjax.data.sources import RawRow, Rejected, decode, merge_columns, read_rows, records_in
from dqjax.data.split import hold_out, weigh, without_questions
from dqjax.types import Batch

COLUMNS = {"verbosity": VERBOSITY, "difficulty": DIFFICULTY}
"""Name of each label in a batch, and its column in a row."""

_CHUNK = 512  # rows tokenised at once


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledSet:
    """Tokenised conversations with labels, of one or several sources.

    Attributes:
      sequences: token ids of whole conversations.
      labels: by name; NaN where missing.
      question: `question_key`, equal for chains of the same problem.
      source: index into `sources`.
      ids: the stable id of each conversation.
      sources: labels of the sources.
    """

    sequences: Sequence[np.ndarray]
    labels: Mapping[str, Float[np.ndarray, " n"]]
    question: Int[np.ndarray, " n"]
    source: Int[np.ndarray, " n"]
    ids: Sequence[str]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledRows:
    """Conversations planned into rows: item p of the plan is number `numbers[p]` of `data`."""

    data: LabelledSet
    numbers: Int[np.ndarray, " items"]
    plan: RowPlan
    row_length: int

    @classmethod
    def of(cls, data: LabelledSet, numbers: Int[np.ndarray, " items"], row_length: int) -> "LabelledRows":
        """The rows of the conversations called `numbers`."""
        lengths = [len(data.sequences[n]) for n in numbers.tolist()]
        return cls(data, numbers, best_fit_decreasing(lengths, row_length), row_length)

    def __len__(self) -> int:
        return len(self.plan)

    def weights(self, rows: Sequence[int]) -> dict[str, float]:
        """1 / labels of each name in these rows."""
        numbers = self.numbers[np.concatenate([self.plan[r] for r in rows])]
        counts = {name: np.count_nonzero(~np.isnan(labels[numbers])) for name, labels in self.data.labels.items()}
        return {name: 1.0 / max(count, 1) for name, count in counts.items()}

    def row(self, r: int, weights: Mapping[str, float]) -> list[Tokens]:
        """The sequences of row r."""
        return [self._sequence(int(self.numbers[p]), weights) for p in self.plan[r].tolist()]

    def _sequence(self, n: int, weights: Mapping[str, float]) -> Tokens:
        values: dict[str, int | float] = {"row": n, "source": int(self.data.source[n])}
        for name, labels in self.data.labels.items():
            known = not math.isnan(labels[n])
            values |= {name: float(labels[n]) if known else -1.0, f"{name}_weight": weights[name] if known else 0.0}
        ids = self.data.sequences[n]
        return Tokens(ids, np.arange(len(ids)) == len(ids) - 1, values)


class LabelledLoader(Loader):
    """A `Source` of batches of labelled conversations, without end."""

    def __init__(self, rows: LabelledRows, **options: Any):
        """`options` are those of `Loader`."""
        super().__init__([Stage(rows, None)], **options)

    def batch_at(self, position: int) -> Batch:
        """The batch whose first row is number `position` since the start of training."""
        rows = self.stages[0].rows
        places = [self._shuffled(*self._locate(p)) for p in range(position, position + self.batch_rows)]
        weights = rows.weights(places)
        local = [rows.row(places[i], weights) for i in self.local_rows]
        return pack_rows(local, self.row_length, columns=self.columns, reduction="sum", pad_id=self._pad_id)


class LabelledEvaluation:
    """Held-out conversations in a fixed order, weighed over the whole set; the last batch is filled up."""

    def __init__(self, rows: LabelledRows, *, batch_rows: int, local_rows: Sequence[int] | None = None, pad_id: int = 0):
        self.rows, self.batch_rows = rows, batch_rows
        self.local_rows = list(range(batch_rows) if local_rows is None else local_rows)
        self._pad_id = pad_id

    def __iter__(self) -> Iterator[Batch]:
        rows, weights = self.rows, self.rows.weights(range(len(self.rows)))
        for first in range(0, len(rows), self.batch_rows):
            local = [rows.row(first + i, weights) if first + i < len(rows) else [] for i in self.local_rows]
            # One row more, dropped again: a host whose rows are all empty then has the side arrays of the others.
            local.append(rows.row(0, weights))
            columns = rows.plan.columns
            batch = pack_rows(local, rows.row_length, columns=columns, reduction="sum", pad_id=self._pad_id)
            yield jax.tree.map(lambda x: x[:-1], batch)


@dataclasses.dataclass(frozen=True)
class LabelledData:
    """What a scorer's run reads: `data.loader.TrainingData` for labelled conversations."""

    loader: LabelledLoader
    validation: LabelledEvaluation | None
    counts: Mapping[str, int]


def open_labelled_data(
    config: DataConfig, tokenizer: Any, *, batch_rows: int, local_rows: Sequence[int] | None = None
) -> LabelledData:
    """Reads, tokenises, splits, packs and orders the labelled conversations that a `data:` section names.

    Raises:
      ConfigError: data that cannot be read or leave nothing to train on, or settings that scorers do not know.
    """
    for key in ("too_long", "train_on_prompt", "curriculum", "thinking", "no_think_share"):
        if getattr(config, key) != DataConfig.model_fields[key].default:
            raise ConfigError(f"data.{key}: scorers read whole conversations as they are served; leave the key out")
    chat = ChatFormat.of(tokenizer)
    found, counts = load_labelled(config, config.sources, chat)
    held, out, train = found, None, np.arange(len(found))
    if isinstance(config.validation, str):
        source = SourceConfig(path=config.validation)
        held, _ = load_labelled(config.model_copy(update={"quarantine": None}), [source], chat)
        out, train = np.arange(len(held)), without_questions(found, held)
    elif config.validation is not None:
        out, train = hold_out(found, config.validation, config.seed)
    if not len(train):
        raise ConfigError("data: every training conversation asks a held-out question")
    rows = LabelledRows.of(found, weigh(config.sources, found.source, train, config.seed), config.row_length)
    placing = {"batch_rows": batch_rows, "local_rows": local_rows, "pad_id": tokenizer.pad_token_id}
    loader = LabelledLoader(rows, seed=config.seed, prefetch=config.prefetch, **placing)
    validation = None
    if out is not None:
        validation = LabelledEvaluation(LabelledRows.of(held, out, config.row_length), **placing)
        counts["held_out"] = len(out)
    return LabelledData(loader, validation, counts | {"conversations": len(rows.numbers), "rows": len(rows)})


def load_labelled(
    config: DataConfig, sources: Sequence[SourceConfig], chat: ChatFormat
) -> tuple[LabelledSet, dict[str, int]]:
    """The labelled conversations of `sources` that fit into a row; the others go to the quarantine file.

    Raises:
      ConfigError: a source cannot be read, more than `max_bad_share` of the rows are bad (too long is not bad), or none
        is left.
    """
    found: list[tuple[int, Record, np.ndarray, dict[str, float]]] = []
    bad: list[Rejected] = []
    too_long: list[Rejected] = []
    read, closing = 0, closing_ids(chat)
    for i, source in enumerate(sources):
        names = merge_columns(config.columns, source.columns)
        rows = iter(tqdm(read_rows(source), f"tokenising {source.label}", unit=" rows", disable=None, mininterval=1.0))
        while chunk := list(itertools.islice(rows, _CHUNK)):
            read += len(chunk)
            items = [(raw, item) for raw in chunk for item in records_in(raw, names, source.label)]
            bad += [item for _, item in items if isinstance(item, Rejected)]
            records = [(raw, item) for raw, item in items if isinstance(item, Record)]
            for (raw, record), turns in zip(records, chat.turns([r for _, r in records], ["turn"] * len(records))):
                labels = _labels(raw, record)
                if isinstance(turns, BadRow) or all(map(math.isnan, labels.values())):
                    reason = str(turns) if isinstance(turns, BadRow) else f"no label in {' or '.join(COLUMNS.values())}"
                    bad.append(Rejected(raw.file, raw.line, reason))
                    continue
                ids = np.array([*turns[-1].ids, *closing], np.int32)
                if len(ids) > config.row_length:
                    reason = f"the conversation has {len(ids)} tokens, over data.row_length = {config.row_length}"
                    too_long.append(Rejected(raw.file, raw.line, reason))
                    continue
                found.append((i, record, ids, labels))
    rejected = sorted(bad + too_long, key=lambda row: (row.file, row.line))
    write_rejected(rejected, read, max_share=math.inf, path=config.quarantine)
    if len(bad) > config.max_bad_share * read:
        first = bad[0]
        raise ConfigError(
            f"{len(bad)} of {read} rows are unusable, more than data.max_bad_share = {config.max_bad_share:g}; "
            f"the first at {first.file}:{first.line}: {first.reason}"
        )
    if not found:
        raise ConfigError(f"data: no labelled conversation in {', '.join(s.label for s in sources)}")
    made = LabelledSet(
        sequences=[ids for _, _, ids, _ in found],
        labels={name: np.array([labels[name] for *_, labels in found]) for name in COLUMNS},
        question=np.array([question_key(record) for _, record, *_ in found], np.int64),
        source=np.array([i for i, *_ in found], np.int32),
        ids=[record.id for _, record, *_ in found],
        sources=tuple(s.label for s in sources),
    )
    return made, {"bad": len(bad), "too_long": len(too_long)}


def _labels(raw: RawRow, record: Record) -> dict[str, float]:
    """Each label of a record; NaN where it is missing or no number from 0 to 9."""
    row = dict(record.extra)
    if DIFFICULTY not in row and DIFFICULTY in decode(raw):  # the parser took the column for the record's difficulty
        row[DIFFICULTY] = record.difficulty
    values = {name: label_of(row, column) for name, column in COLUMNS.items()}
    return {name: math.nan if value is None else value for name, value in values.items()}
