"""The training source of scorers: whole conversations with judge labels, packed, in a seeded order.

    verbosity, difficulty                   the label, 0 … 9; -1 where it is missing
    verbosity_weight, difficulty_weight     1 / labels of that name in the global batch; 0 where it is missing

Order and state are those of `data.loader`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dqjax.config import ConfigError
from dqjax.data.chain_rows import DIFFICULTY, VERBOSITY, label_of
from dqjax.data.chat import ChatFormat
from dqjax.data.config import DataConfig, SourceConfig
from dqjax.data.pack import RowPlan, Tokens, best_fit_decreasing
from dqjax.data.pair_loader import closing_ids
from dqjax.data.reading import TooLong, read_items
from dqjax.data.records import BadRow, Record, question_key
from dqjax.data.sources import RawRow, decode
from dqjax.data.split import split
from dqjax.data.weighed import WeighedEvaluation, WeighedLoader

COLUMNS = {"verbosity": VERBOSITY, "difficulty": DIFFICULTY}
"""Name of each label in a batch, and its column in a row."""


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

    def take(self, numbers: Int[np.ndarray, " some"]) -> "LabelledSet":
        """These conversations alone, numbered anew."""
        return dataclasses.replace(
            self,
            sequences=[self.sequences[n] for n in numbers.tolist()],
            labels={name: column[numbers] for name, column in self.labels.items()},
            question=self.question[numbers],
            source=self.source[numbers],
            ids=[self.ids[n] for n in numbers.tolist()],
        )


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

    @property
    def columns(self) -> int:
        return self.plan.columns

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


@dataclasses.dataclass(frozen=True)
class LabelledData:
    """What a scorer's run reads: `data.loader.TrainingData` for labelled conversations."""

    loader: WeighedLoader
    validation: WeighedEvaluation | None
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
    train, held, more = split(config, found, lambda config, sources: load_labelled(config, sources, chat)[0])
    rows = LabelledRows.of(found, train, config.row_length)
    placing = {"batch_rows": batch_rows, "local_rows": local_rows, "pad_id": tokenizer.pad_token_id}
    loader = WeighedLoader(rows, seed=config.seed, prefetch=config.prefetch, **placing)
    validation = None
    if held is not None:
        validation = WeighedEvaluation(LabelledRows.of(held, np.arange(len(held)), config.row_length), **placing)
    return LabelledData(loader, validation, counts | more | {"conversations": len(rows.numbers), "rows": len(rows)})


def load_labelled(
    config: DataConfig, sources: Sequence[SourceConfig], chat: ChatFormat
) -> tuple[LabelledSet, dict[str, int]]:
    """The labelled conversations of `sources` that fit into a row, and counts of the others; see `read_items`."""
    closing = closing_ids(chat)

    def labelled(turns: Any, labels: dict[str, float] | BadRow) -> tuple[np.ndarray, dict[str, float]] | BadRow:
        for bad in (turns, labels):
            if isinstance(bad, BadRow):
                return bad
        if all(map(math.isnan, labels.values())):
            return BadRow(f"no label in {' or '.join(COLUMNS.values())}")
        ids = np.array([*turns[-1].ids, *closing], np.int32)
        if len(ids) > config.row_length:
            return TooLong(f"the conversation has {len(ids)} tokens, over data.row_length = {config.row_length}")
        return ids, labels

    def make(raws: Sequence[RawRow], records: Sequence[Record]) -> list[tuple[np.ndarray, dict[str, float]] | BadRow]:
        rendered = chat.turns(records, ["turn"] * len(records))
        return [labelled(turns, _labels(raw, record)) for raw, record, turns in zip(raws, records, rendered, strict=True)]

    items, counts = read_items(config, sources, make, what="labelled conversation")
    found = LabelledSet(
        sequences=[item.made[0] for item in items],
        labels={name: np.array([item.made[1][name] for item in items]) for name in COLUMNS},
        question=np.array([question_key(item.record) for item in items], np.int64),
        source=np.array([item.source for item in items], np.int32),
        ids=[item.record.id for item in items],
        sources=tuple(s.label for s in sources),
    )
    return found, counts


def _labels(raw: RawRow, record: Record) -> dict[str, float] | BadRow:
    """Each label of a record; NaN where it is missing, and no row where one is there and no number from 0 to 9."""
    row = dict(record.extra)
    if DIFFICULTY not in row and DIFFICULTY in decode(raw):  # the parser took the column for the record's difficulty
        row[DIFFICULTY] = record.difficulty
    values: dict[str, float] = {}
    for name, column in COLUMNS.items():
        value = label_of(row, column)
        if value is None and row.get(column) is not None:
            return BadRow(f"{column}: expected a number from 0 to 9, got {row[column]!r}")
        values[name] = math.nan if value is None else value
    return values
