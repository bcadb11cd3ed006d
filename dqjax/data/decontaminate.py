"""Benchmark problems found in data: equal questions, ten words in a row, or a high normalised Indel similarity.

The three tests of OmniThought's decontamination, on texts in canonical form (`canonical`):

    equal       the same question (`records.question_key`)
    10-gram     ten consecutive words, of which at least five are different
    similarity  1 − (|a| + |b| − 2·LCS(a, b)) / (|a| + |b|) = 2·LCS(a, b) / (|a| + |b|)  ≥ 0.8, for texts of 40
    characters

LCS is the longest common subsequence, found bit-parallel (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
Only pairs that share three consecutive words are compared: a copy in which no three words in a row survived is not
found.

Words that more than half of a benchmark's problems use (a common instruction, "the") are taken out before comparing
with
it, as `eval.overlap` does: a task whose problems differ in their numbers alone would match itself otherwise.
"""

import argparse
import collections
import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic

from dqjax.config import ConfigError, Section, validate
from dqjax.data.canonical import tokens
from dqjax.data.config import ColumnsConfig, SourceConfig
from dqjax.data.parallel import map_chunks
from dqjax.data.records import Record, question_key
from dqjax.data.sources import RawRow, Rejected, decode, read_records, read_rows, records_in
from dqjax.data.writing import RowWriter

HELP = "remove rows whose question is in a benchmark, and say which and why"
EXAMPLE = "python -m dqjax.data decontaminate data/train.jsonl --against aime24.jsonl math500.jsonl --out clean.jsonl"

FEW = 10  # so few problems do not show which words are common
DISTINCT = 5  # different words of a gram that counts: "1 1 1 1 ..." is in many problems
SHORTEST = 40  # characters; shorter texts are alike by chance
CROWD = 50  # a word trigram of more problems of a benchmark than that is a phrase, and starts no comparison


class DecontaminateConfig(Section):
    """decontaminate.

    benchmarks: files, `datasets` names or tasks with the problems that must not be trained on.
    words: length of the gram. similarity: threshold of the Indel test; null leaves it out.
    """

    benchmarks: tuple[SourceConfig, ...] = pydantic.Field(min_length=1)
    words: int = pydantic.Field(10, ge=3)
    similarity: float | None = pydantic.Field(0.8, gt=0, le=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Match:
    """Where a question was found: benchmark and problem, by which test, how similar, and the benchmark's text."""

    benchmark: str
    problem: str
    test: str
    score: float
    text: str


class Benchmarks:
    """An index of benchmark problems.

    Raises:
      ConfigError: a benchmark without problems, or with unusable rows.
    """

    def __init__(self, config: DecontaminateConfig):
        self._indexes = [_Index(source, config.words, config.similarity) for source in config.benchmarks]

    def find(self, record: Record) -> Match | None:
        """The first benchmark problem that the record's question repeats; None where there is none."""
        key, parts = question_key(record), tokens(record.question)
        return next((match for index in self._indexes if (match := index.find(key, parts)) is not None), None)

    def __call__(self, records: Sequence[Record]) -> list[Match | None]:
        """`find` of each, for `parallel.map_chunks`."""
        return [self.find(record) for record in records]


class _Index:
    def __init__(self, source: SourceConfig, words: int, similarity: float | None):
        self._label, self._words, self._similarity = source.label, words, similarity
        problems: list[Record] = []
        for item in read_records(source):
            if isinstance(item, Rejected):
                raise ConfigError(f"benchmark {source.label}: {item.file}:{item.line}: {item.reason}")
            problems.append(item)
        if not problems:
            raise ConfigError(f"benchmark {source.label} holds no problems")
        self._names = [(p.id, p.question) for p in problems]
        parts = [tokens(p.question) for p in problems]
        uses = collections.Counter(word for mine in parts for word in set(mine) if not word[0].isdigit())
        self._common = {w for w, n in uses.items() if n > len(problems) / 2} if len(problems) >= FEW else set()
        self._keys = {question_key(p): i for i, p in reversed(list(enumerate(problems)))}
        self._grams: dict[str, int] = {}
        self._seeds: dict[str, list[int]] = collections.defaultdict(list)
        self._texts: list[str] = []
        for i, mine in enumerate(parts):
            mine = [word for word in mine if word not in self._common]
            self._texts.append(" ".join(mine))
            for gram in self._grams_of(mine):
                self._grams.setdefault(gram, i)
            if similarity is not None and len(self._texts[i]) >= SHORTEST:
                for seed in set(_trigrams(mine)):
                    self._seeds[seed].append(i)
        self._seeds = {seed: places for seed, places in self._seeds.items() if len(places) <= CROWD}
        self._masks: dict[int, dict[str, int]] = {}

    def find(self, key: int, parts: Sequence[str]) -> Match | None:
        if (i := self._keys.get(key)) is not None:
            return self._match(i, "equal", 1.0)
        parts = [word for word in parts if word not in self._common]
        for gram in self._grams_of(parts):
            if (i := self._grams.get(gram)) is not None:
                return self._match(i, f"{self._words}-gram", 1.0)
        text = " ".join(parts)
        if self._similarity is None or len(text) < SHORTEST:
            return None
        candidates = Counter(i for seed in set(_trigrams(parts)) for i in self._seeds.get(seed, ()))
        for i, _ in candidates.most_common():
            a, b = len(self._texts[i]), len(text)
            if 2 * min(a, b) < self._similarity * (a + b):
                continue  # even a text contained in the other would not reach it
            score = 2 * self._common_length(i, text) / (a + b)
            if score >= self._similarity:
                return self._match(i, "similarity", round(score, 4))
        return None

    def _match(self, i: int, test: str, score: float) -> Match:
        return Match(self._label, self._names[i][0], test, score, self._names[i][1])

    def _grams_of(self, parts: Sequence[str]) -> Iterator[str]:
        words = [part for part in parts if part[0].isalnum()]
        for i in range(len(words) - self._words + 1):
            gram = words[i : i + self._words]
            if len(set(gram)) >= min(DISTINCT, self._words):
                yield " ".join(gram)

    def _common_length(self, i: int, text: str) -> int:
        if i not in self._masks:
            self._masks[i] = bit_masks(self._texts[i])
        return longest_common_subsequence(self._masks[i], len(self._texts[i]), text)


def indel_similarity(a: str, b: str) -> float:
    """2·LCS(a, b) / (|a| + |b|): 1 for equal texts, 0 for texts without a common character; 1 for two empty ones."""
    return 2 * longest_common_subsequence(bit_masks(a), len(a), b) / (len(a) + len(b)) if a or b else 1.0


def bit_masks(text: str) -> dict[str, int]:
    """For each character the set of its places, as bits."""
    masks: dict[str, int] = {}
    for i, char in enumerate(text):
        masks[char] = masks.get(char, 0) | 1 << i
    return masks


def longest_common_subsequence(masks: Mapping[str, int], length: int, text: str) -> int:
    """Length of the longest common subsequence of `text` and the text of `masks`.

    Zeros of `row` mark the rows of the dynamic programme in which the value rises; one addition carries a whole column.
    """
    full = (1 << length) - 1
    row = full
    for char in text:
        if matches := row & masks.get(char, 0):
            row = (row + matches | row - matches) & full
    return length - row.bit_count()


def _trigrams(parts: Sequence[str]) -> list[str]:
    return [" ".join(three) for three in zip(parts, parts[1:], parts[2:])]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", help="jsonl or parquet file, folder, or `datasets` name, in any form that training reads"
    )
    parser.add_argument("--against", nargs="+", required=True, metavar="FILE", help="benchmark files")
    parser.add_argument("--out", required=True, metavar="FILE", help="the rows that are clean, as they are")
    parser.add_argument("--words", type=int, default=10, help="default %(default)s")
    parser.add_argument("--similarity", type=float, default=0.8, help="default %(default)s; 0 leaves the test out")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")


def run(args: argparse.Namespace) -> None:
    settings = {"benchmarks": args.against, "words": args.words, "similarity": args.similarity or None}
    config = validate(DecontaminateConfig, settings, where="options")
    counts = decontaminate(args.file, config, args.out, workers=args.workers)
    for name, count in counts.items():
        print(f"{count:>9,}  {name}")


def decontaminate(
    file: str, config: DecontaminateConfig, out: str | pathlib.Path, *, workers: int | None = None
) -> dict[str, int]:
    """Writes the clean rows of `file`, and OUT.contaminated.jsonl with what was found; returns counts.

    Unusable rows are reported as such and not written: nobody knows what they ask.
    """
    out = pathlib.Path(out)
    work = _RowWork(SourceConfig.model_validate(file), Benchmarks(config))
    counts: Counter[str] = Counter(clean=0)
    with RowWriter(out) as clean, RowWriter(out.with_name(f"{out.stem}.contaminated.jsonl")) as found:
        for results in map_chunks(work, read_rows(work.source), size=256, workers=workers):
            for row, report in results:
                if report is None:
                    clean.write(row)
                    counts["clean"] += 1
                else:
                    found.write(report)
                    counts[f"{report['test']} {report['benchmark']}".strip()] += 1
    return dict(counts)


@dataclasses.dataclass
class _RowWork:
    """(row, None) for clean rows, (None, report) for the others."""

    source: SourceConfig
    benchmarks: Benchmarks

    def __call__(self, raws: Sequence[RawRow]) -> list[tuple[Any, dict | None]]:
        return [self._look(raw) for raw in raws]

    def _look(self, raw: RawRow) -> tuple[Any, dict | None]:
        items = records_in(raw, ColumnsConfig(), self.source.label)
        records = [item for item in items if isinstance(item, Record)]
        if not records:
            reason = items[0].reason if items else "no record"
            return None, {"file": raw.file, "line": raw.line, "test": "unusable", "benchmark": "", "text": reason}
        match = self.benchmarks.find(records[0])  # the chains of a problem share its question
        if match is None:
            return decode(raw), None
        id = records[0].problem
        return None, {
            "file": raw.file,
            "line": raw.line,
            "id": id,
            "question": records[0].question,
            **dataclasses.asdict(match),
        }
