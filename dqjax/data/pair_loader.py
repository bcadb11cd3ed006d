"""The training source of preference pairs: packed rows in a seeded order, with the two sequences of a pair in one row.

    row          chosen a | rejected a | chosen b | rejected b | padding
    pair_id         7           7           3           3          -1       equal for the two of a pair
    chosen          1           0           1           0          -1
    weight          w           w           w           w           0       1 / pairs of the global batch

A pair is one item to the packer, so no micro-batch border cuts it. Order and state are those of `data.loader`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat
from dqjax.data.config import DataConfig, SourceConfig
from dqjax.data.pack import RowPlan, Tokens, best_fit_decreasing
from dqjax.data.pair_checks import report_right_rejected
from dqjax.data.reading import TooLong, read_items
from dqjax.data.records import BadRow, Record, question_key
from dqjax.data.sources import RawRow
from dqjax.data.split import split
from dqjax.data.tokenise import turn_mode
from dqjax.data.weighed import WeighedEvaluation, WeighedLoader


@dataclasses.dataclass(frozen=True, eq=False)
class PairSet:
    """Tokenised pairs of one or several sources.

    Attributes:
      sequences: (chosen, rejected) token ids, each with the prompt that both share.
      answer_start: tokens before it are the prompt.
      question: `question_key`, equal for pairs of the same problem.
      source: index into `sources`.
      values: the columns asked for (`beta`, `margin`), one number a pair.
      ids: the stable id of each pair.
      sources: labels.
      sequence_values: numbers of (chosen, rejected), `reference_logprob` for instance.
    """

    sequences: Sequence[tuple[np.ndarray, np.ndarray]]
    answer_start: Int[np.ndarray, " P"]
    question: Int[np.ndarray, " P"]
    source: Int[np.ndarray, " P"]
    values: Mapping[str, Float[np.ndarray, " P"]]
    ids: Sequence[str]
    sources: tuple[str, ...]
    sequence_values: Mapping[str, Float[np.ndarray, "P 2"]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    def prompt(self, pair: int) -> np.ndarray:
        """The token ids of a pair's prompt."""
        return self.sequences[pair][0][: self.answer_start[pair]]

    def take(self, numbers: Int[np.ndarray, " some"]) -> "PairSet":
        """These pairs alone, numbered anew."""
        return dataclasses.replace(
            self,
            sequences=[self.sequences[n] for n in numbers.tolist()],
            ids=[self.ids[n] for n in numbers.tolist()],
            values={name: column[numbers] for name, column in self.values.items()},
            sequence_values={name: column[numbers] for name, column in self.sequence_values.items()},
            **{name: getattr(self, name)[numbers] for name in ("answer_start", "question", "source")},
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PairRows:
    """Pairs planned into rows of `row_length` tokens.

    Attributes:
      pairs: where the tokens are.
      numbers: item p is pair `numbers[p]`; a pair may occur twice.
      plan: rows of items.
    """

    pairs: PairSet
    numbers: Int[np.ndarray, " items"]
    plan: RowPlan
    row_length: int

    @classmethod
    def of(cls, pairs: PairSet, numbers: Int[np.ndarray, " items"], row_length: int) -> "PairRows":
        """The rows of the pairs called `numbers`; raises ValueError where one is longer than a row."""
        lengths = [sum(map(len, pairs.sequences[n])) for n in numbers.tolist()]
        return cls(pairs, numbers, best_fit_decreasing(lengths, row_length), row_length)

    def __len__(self) -> int:
        return len(self.plan)

    def count(self, r: int) -> int:
        """Pairs of row r."""
        return len(self.plan[r])

    @property
    def columns(self) -> int:
        return 2 * self.plan.columns

    def weights(self, rows: Sequence[int]) -> float:
        """1 / pairs of these rows."""
        return 1.0 / sum(self.count(r) for r in rows)

    def row(self, r: int, weight: float) -> list[Tokens]:
        """The sequences of row r, chosen before rejected; `weight` is the share of each pair in the loss."""
        return [sequence for p in self.plan[r].tolist() for sequence in self._pair(p, weight)]

    def _pair(self, p: int, weight: float) -> Iterator[Tokens]:
        n = int(self.numbers[p])
        values = {"row": n, "pair_id": p, "source": int(self.pairs.source[n]), "weight": weight}
        values |= {name: float(column[n]) for name, column in self.pairs.values.items()}
        for side, ids in enumerate(self.pairs.sequences[n]):
            own = {name: float(column[n, side]) for name, column in self.pairs.sequence_values.items()}
            trained = np.arange(len(ids)) >= self.pairs.answer_start[n]
            yield Tokens(ids, trained, values | own | {"chosen": 1 - side})


class PairEvaluation(WeighedEvaluation):
    """Held-out pairs, weighed over the whole set."""

    @property
    def pairs(self) -> PairSet:
        """The held-out ones; the side value `row` numbers them."""
        return self.rows.pairs


@dataclasses.dataclass(frozen=True)
class PairData:
    """What a run on pairs reads: `data.loader.TrainingData` for pairs."""

    loader: WeighedLoader
    validation: PairEvaluation | None
    pairs: PairSet
    counts: Mapping[str, int]


def open_pair_data(
    config: DataConfig,
    tokenizer: Any,
    *,
    batch_rows: int,
    local_rows: Sequence[int] | None = None,
    columns: Sequence[str] = (),
    whole: bool = False,
    sequence_values: Callable[[PairSet], Mapping[str, Float[np.ndarray, "P 2"]]] | None = None,
) -> PairData:
    """Reads, tokenises, splits, packs and orders the pairs that a `data:` section names.

    Args:
      tokenizer: from `dqjax.data.tokenizer.load_tokenizer`.
      batch_rows: B, rows of the global batch.
      local_rows: positions in it that this process supplies; by default all.
      columns: number columns that every row must have: `beta` (above 0), `margin` (at least 0).
      whole: sequences end as the template ends a conversation, see `closing_ids`.
      sequence_values: what else each sequence carries, see `PairSet`.

    Raises:
      ConfigError: data that cannot be read, leave nothing to train on, or settings that pairs do not know.
    """
    _refuse_other_settings(config)
    chat = ChatFormat.of(tokenizer)
    closing = closing_ids(chat) if whole else []

    def load(config: DataConfig, sources: Sequence[SourceConfig]) -> tuple[PairSet, dict[str, int]]:
        pairs, counts = load_pairs(config, sources, chat, columns, closing)
        return dataclasses.replace(pairs, sequence_values=sequence_values(pairs) if sequence_values else {}), counts

    pairs, counts = load(config, config.sources)
    train, held, more = split(config, pairs, lambda config, sources: load(config, sources)[0])
    rows = PairRows.of(pairs, train, config.row_length)
    placing = {"batch_rows": batch_rows, "local_rows": local_rows, "pad_id": tokenizer.pad_token_id}
    loader = WeighedLoader(rows, seed=config.seed, prefetch=config.prefetch, **placing)
    validation = None
    if held is not None:
        validation = PairEvaluation(PairRows.of(held, np.arange(len(held)), config.row_length), **placing)
    return PairData(loader, validation, pairs, counts | more | {"pairs": len(rows.numbers), "rows": len(rows)})


def load_pairs(
    config: DataConfig,
    sources: Sequence[SourceConfig],
    chat: ChatFormat,
    columns: Sequence[str] = (),
    closing: Sequence[int] = (),
) -> tuple[PairSet, dict[str, int]]:
    """The pairs of `sources` that fit into a row, and counts of the others; see `read_items`.

    The count `rejected_right` is of pairs whose rejected answer is right, see `report_right_rejected`.
    """

    def make(raws: Sequence[RawRow], records: Sequence[Record]) -> list[_Made | BadRow]:
        return [_fitting(made, closing, config.row_length) for made in _tokenise(records, config, chat, columns)]

    items, counts = read_items(config, sources, make, what="pair")
    pairs = PairSet(
        sequences=[item.made[:2] for item in items],
        answer_start=np.array([item.made[2] for item in items], np.int32),
        question=np.array([question_key(item.record) for item in items], np.int64),
        source=np.array([item.source for item in items], np.int32),
        values={name: np.array([item.made[3][k] for item in items]) for k, name in enumerate(columns)},
        ids=[item.record.id for item in items],
        sources=tuple(s.label for s in sources),
    )
    return pairs, counts | {"rejected_right": report_right_rejected(items)}


def closing_ids(chat: ChatFormat) -> list[int]:
    """What the template writes behind an answer's end mark; for Qwen a newline.

    A served conversation ends with it, and a classifier is read at the last token: it must be there in training too.
    """
    said = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]
    ids = chat.encode([chat.tokenizer.apply_chat_template(said, tokenize=False)])[0]
    return ids[len(ids) - ids[::-1].index(chat.end_id) :]


_Made = tuple[np.ndarray, np.ndarray, int, list[float]]
"""(chosen, rejected, answer_start, numbers) of a pair."""


def _fitting(made: _Made | BadRow, closing: Sequence[int], row_length: int) -> _Made | BadRow:
    """The pair with its closing tokens, if it fits into a row."""
    if isinstance(made, BadRow):
        return made
    chosen, rejected = (np.array([*ids, *closing], np.int32) for ids in made[:2])
    if (length := len(chosen) + len(rejected)) > row_length:
        return TooLong(f"the pair has {length} tokens, over data.row_length = {row_length}")
    return chosen, rejected, *made[2:]


def _tokenise(
    records: Sequence[Record], config: DataConfig, chat: ChatFormat, columns: Sequence[str]
) -> list[_Made | BadRow]:
    """(chosen, rejected, answer_start, numbers) of each record, or why there are none."""
    checked: list[list[float] | BadRow] = []
    for record in records:
        try:
            checked.append(_check(record, turn_mode(record, config), columns))
        except BadRow as bad:
            checked.append(bad)
    good = [record for record, row in zip(records, checked) if not isinstance(row, BadRow)]
    modes = [turn_mode(record, config) for record in good]
    sides = [
        iter(chat.turns([dataclasses.replace(r, messages=(*r.messages, getattr(r, side))) for r in good], modes))
        for side in ("chosen", "rejected")
    ]
    return [row if isinstance(row, BadRow) else _join(*map(next, sides), row) for row in checked]


def _check(record: Record, mode: str, columns: Sequence[str]) -> list[float]:
    """The numbers of a row's columns; raises BadRow for a row that is no pair."""
    if record.chosen is None or record.rejected is None:
        raise BadRow("not a pair: expected the columns prompt, chosen, rejected")
    if mode == "on" and (record.chosen.reasoning is None or record.rejected.reasoning is None):
        raise BadRow("an answer without a chain, and thinking is on")
    numbers = []
    for name in columns:
        value = record.extra.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadRow(f"{name}: expected a number, got {value!r}")
        if value < 0 or (name == "beta" and value == 0):
            raise BadRow(f"{name}: expected {'above' if name == 'beta' else 'at least'} 0, got {value!r}")
        numbers.append(float(value))
    return numbers


def _join(chosen: Any, rejected: Any, numbers: list[float]) -> _Made | BadRow:
    """A pair of the last turns of two rendered conversations."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(turns, BadRow):
            return BadRow(f"{name}: {turns}")
    (good, bad), start = (chosen[-1].ids, rejected[-1].ids), chosen[-1].answer_start
    if rejected[-1].answer_start != start or not np.array_equal(good[:start], bad[:start]):
        return BadRow("chosen and rejected stand behind different prompts: one has a chain and the other none")
    if np.array_equal(good, bad):
        return BadRow("chosen and rejected are equal once rendered")
    return good, bad, start, numbers


def _refuse_other_settings(config: DataConfig) -> None:
    """Raises ConfigError for what documents know and pairs do not."""
    for key, usual in (("too_long", "drop"), ("train_on_prompt", False), ("curriculum", None)):
        if (got := getattr(config, key)) != usual:
            said = "null" if usual is None else str(usual).lower()
            raise ConfigError(f"data.{key}: pairs know only {said}, got {got}; leave the key out")
