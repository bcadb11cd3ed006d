"""Problems and chains from several sources into files whose splits share no question.

The sources are read twice and never held (some 20 bytes a row are): first the hash of each normalised question, from
which the held-out ones are drawn, then the rows, each written to the split of its question. So the chains of one
problem always stay together. On the first reading near-duplicates and benchmark problems are found too; removed.jsonl
names them.
"""

import argparse
import array
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import pydantic

from dqjax.config import ConfigError, Section, load
from dqjax.data.chains import write_chain, write_hasty_chain, write_mistaken_chain
from dqjax.data.config import ColumnsConfig, SourceConfig
from dqjax.data.decontaminate import Benchmarks, DecontaminateConfig
from dqjax.data.documents import write_rejected
from dqjax.data.near_duplicates import NearConfig
from dqjax.data.records import Message, Record, question_key
from dqjax.data.removal import Removed, find_removed
from dqjax.data.sources import Rejected, read_records

_SPLITS = (None, "test", "validation", "train")

HELP = "write problem and chain files from sources, with train, validation and test splits that share no question"
EXAMPLE = "python -m dqjax.data collect --config configs/data/chain_sum.yaml"


class CollectConfig(Section):
    """The config of `python -m dqjax.data collect`.

    out: folder for the files.
    sources: as in a training config; `weight` and `share` have no effect here.
    columns: column names for all sources.
    test: problems to hold out into test.jsonl, as prompt and answer without chains (rows without a reference answer as
      they are).
    validation: problems to hold out into validation files, in the form of the training files.
    train: problems in the training files at most; by default all that are left.
    near_duplicates: also remove problems that nearly repeat an earlier one; by default only equal rows go.
    decontaminate: remove problems that are in a benchmark.
    workers: processes for these two; by default the machine's cores, at most 16.
    chain_styles: for `chain_sum` problems, one training and validation file for each of these: the styles of
      `dqjax.data.chains`, `mistaken` (columns with a wrong digit), or `pairs` (columns preferred to mistaken ones).
    more_mistakes: in mistaken chains, the chance of every other column to be wrong too.
    seed: of the draw of held-out problems.
    max_bad_share: the command fails when more of the rows than this are unusable.
    """

    out: str
    sources: tuple[SourceConfig, ...] = pydantic.Field(min_length=1)
    columns: ColumnsConfig = ColumnsConfig()
    test: int = pydantic.Field(0, ge=0)
    validation: int = pydantic.Field(0, ge=0)
    train: int | None = pydantic.Field(None, ge=1)
    near_duplicates: NearConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    workers: int | None = pydantic.Field(None, ge=1)
    chain_styles: tuple[Literal["columns", "checked", "running", "answer", "hasty", "mistaken", "pairs"], ...] = ()
    more_mistakes: float = pydantic.Field(0.0, ge=0, le=1)
    seed: int = 0
    max_bad_share: float = pydantic.Field(0.01, ge=0, le=1)

    @pydantic.model_validator(mode="after")
    def _styles_have_chains(self):
        if self.chain_styles and any(s.task != "chain_sum" or s.chain for s in self.sources):
            raise ValueError("chain_styles: every source must be the task chain_sum, without a chain of its own")
        return self


def collect(config: CollectConfig) -> dict[str, int]:
    """Writes the files of a `CollectConfig` and returns what was counted: rows a file, duplicates, unusable rows.

    Raises:
      ConfigError: a source cannot be read, too many rows are bad, or there are fewer problems than asked for.
    """
    keys, said = array.array("q"), array.array("Q")
    rejected: list[Rejected] = []

    def noted() -> Iterator[Record]:
        for item in _records(config):
            if isinstance(item, Rejected):
                rejected.append(item)
            else:
                keys.append(question_key(item))
                said.append(_digest(item))
                yield item

    benchmarks = Benchmarks(config.decontaminate) if config.decontaminate else None
    removed = find_removed(noted(), keys, near=config.near_duplicates, benchmarks=benchmarks, workers=config.workers)
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_rejected(
        rejected, len(keys) + len(rejected), max_share=config.max_bad_share, path=str(out / "rejected.jsonl")
    )
    questions = np.unique(np.array(keys, np.int64))
    questions = questions[~np.isin(questions, np.fromiter(removed, np.int64, len(removed)))]
    splits = _draw_splits(questions, config)
    _, first = np.unique(np.array(said, np.uint64), return_index=True)
    repeats = np.ones(len(said), bool)
    repeats[first] = False
    counts: Counter[str] = Counter(unusable=len(rejected))
    good = (item for item in _records(config) if not isinstance(item, Rejected))
    with _Files(out) as files:
        for record, key, repeat in zip(good, keys, repeats.tolist(), strict=True):
            if (why := removed.get(key)) is not None:
                counts[why.count] += 1
                files.write("removed.jsonl", _removal(record, why))
                continue
            split = splits[np.searchsorted(questions, key)]
            if split and repeat:
                counts["duplicates"] += 1
            elif split:
                for name, row in _rows(record, _SPLITS[split], config):
                    files.write(name, row)
    return dict(counts) | files.rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="YAML file with the keys of CollectConfig")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")


def run(args: argparse.Namespace) -> None:
    config = load(CollectConfig, args.config, args.overrides)
    for name, count in collect(config).items():
        print(f"{count:>9,}  {pathlib.Path(config.out) / name if name.endswith('.jsonl') else name}")


def _records(config: CollectConfig) -> Iterator[Record | Rejected]:
    for source in config.sources:
        yield from read_records(source, config.columns)


def _digest(record: Record) -> int:
    """64 bits that are equal for records that say the same, whatever their ids."""
    said = json.dumps([dataclasses.astuple(m) for m in (*record.messages, record.chosen, record.rejected) if m])
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "little")


def _draw_splits(questions: np.ndarray, config: CollectConfig) -> np.ndarray:
    """For each question the number of its split in `_SPLITS`."""
    held = config.test + config.validation
    if len(questions) <= held or (config.train is not None and len(questions) < held + config.train):
        raise ConfigError(
            f"the sources hold {len(questions)} different problems; asked for {config.test} test, {config.validation} "
            f"validation and {config.train or 'some'} train ones"
        )
    order = np.searchsorted(questions, np.random.default_rng(config.seed).permutation(questions))
    splits = np.zeros(len(questions), np.int8)
    splits[order[: config.test]] = _SPLITS.index("test")
    splits[order[config.test : held]] = _SPLITS.index("validation")
    splits[order[held : None if config.train is None else held + config.train]] = _SPLITS.index("train")
    return splits


def _removal(record: Record, why: Removed) -> dict[str, Any]:
    return {"id": record.id, "source": record.source, "question": record.question, **dataclasses.asdict(why)}


def _rows(record: Record, split: str, config: CollectConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file name, row) for each file that gets the record."""
    if split == "test" and record.answer is not None:
        prompt = tuple(m for m in record.messages if m.role != "assistant")
        yield "test.jsonl", dataclasses.replace(record, messages=prompt).to_row()
    elif config.chain_styles and split != "test":
        for style in config.chain_styles:
            yield f"{split}_{style}.jsonl", _in_style(record, style, config.more_mistakes).to_row()
    else:
        yield f"{split}.jsonl", record.to_row()


def _in_style(record: Record, style: str, more_mistakes: float) -> Record:
    """The `chain_sum` problem with a chain behind it, or a pair of them."""
    expression = record.extra["metadata"]["expression"]

    def right(style: str) -> Message:
        return Message("assistant", record.answer, write_chain(expression, record.answer, style))

    def mistaken() -> Message:
        chain, answer = write_mistaken_chain(expression, more_mistakes)
        return Message("assistant", answer, chain)

    def hasty() -> Message:
        chain, answer = write_hasty_chain(expression)
        return Message("assistant", answer, chain)

    if style == "pairs":
        return dataclasses.replace(record, chosen=right("columns"), rejected=mistaken())
    said = mistaken() if style == "mistaken" else hasty() if style == "hasty" else right(style)
    return dataclasses.replace(record, messages=(*record.messages, said))


class _Files(contextlib.AbstractContextManager):
    """jsonl files that get their names only when all of them are complete."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._open, self._suffix = folder, {}, secrets.token_hex(4)
        self.rows: dict[str, int] = {}

    def write(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self._open:
            self._open[name] = self._making(name).open("w", encoding="utf-8")
            self.rows[name] = 0
        self._open[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[name] += 1

    def __exit__(self, kind, *_) -> None:
        for name, stream in self._open.items():
            stream.close()
            if kind is None:
                self._making(name).replace(self._folder / name)
            else:
                self._making(name).unlink()

    def _making(self, name: str) -> pathlib.Path:
        return self._folder / f".{name}.{self._suffix}"
