"""The problems that a policy is asked: read from sources of any form, split from those that are held out."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dqjax.config import ConfigError
from dqjax.data.config import DataConfig, SourceConfig
from dqjax.data.documents import write_rejected
from dqjax.data.records import Record, question_key
from dqjax.data.sources import Rejected, merge_columns, read_rows, records_in
from dqjax.data.split import hold_out, weigh, without_questions


@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems in the order of their sources.

    Attributes:
      records: conversations that end with the user's turn, one a problem.
      source: number of the source of each.
    """

    records: Sequence[Record]
    source: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def question(self) -> Int[np.ndarray, " N"]:
        """A hash of each question, by which problems are held out."""
        return np.array([question_key(record) for record in self.records], np.int64)

    def take(self, numbers: Int[np.ndarray, " some"]) -> "Problems":
        """These problems alone, in this order."""
        return Problems([self.records[n] for n in numbers.tolist()], self.source[numbers])


def read_problems(
    config: DataConfig, quarantine: pathlib.Path, *, reference: bool
) -> tuple[Problems, Problems | None]:
    """(problems to train on, held-out problems or None) of a `data:` section; an epoch holds them by `weight` or `share`.

    Args:
      quarantine: file for unusable rows, where the config names none.
      reference: problems need a reference answer, or tests.

    Raises:
      ConfigError: sources that cannot be read or leave no problem, or too many unusable rows.
    """
    path = config.quarantine or str(quarantine)
    problems = _read(config, config.sources, path, reference=reference)
    held, train = None, np.arange(len(problems))
    if isinstance(config.validation, str):
        held = _read(config, [SourceConfig(path=config.validation)], None, reference=True)
        train = without_questions(problems, held)
    elif config.validation is not None:
        out, train = hold_out(problems, config.validation, config.seed)
        held = problems.take(out)
    if not len(train):
        raise ConfigError("data: every problem to train on is a held-out one")
    return problems.take(weigh(config.sources, problems.source, train, config.seed)), held


def _read(config: DataConfig, sources: Sequence[SourceConfig], quarantine: str | None, *, reference: bool) -> Problems:
    records: dict[str, Record] = {}
    source_of, rejected, rows = [], [], 0
    for number, source in enumerate(sources):
        columns = merge_columns(config.columns, source.columns)
        for raw in read_rows(source):
            rows += 1
            for record in records_in(raw, columns, source.label):
                problem = record if isinstance(record, Rejected) else _problem_of(record)
                if isinstance(problem, Rejected):
                    rejected.append(problem)
                elif reference and problem.answer is None and "tests" not in problem.extra:
                    rejected.append(Rejected(raw.file, raw.line, "no reference answer, and no tests"))
                elif problem.id not in records:  # another chain of a problem asks nothing new
                    records[problem.id] = problem
                    source_of.append(number)
    write_rejected(rejected, rows, max_share=config.max_bad_share, path=quarantine)
    if not records:
        raise ConfigError(f"data: no problem in {', '.join(s.label for s in sources)}")
    return Problems(list(records.values()), np.array(source_of, np.int64))


def _problem_of(record: Record) -> Record:
    """The problem of a row of any form: its last answer, if it has one, is taken off and serves as the reference."""
    messages, answer = record.messages, record.answer
    if messages[-1].role == "assistant":
        answer = messages[-1].content if answer is None else answer
        messages = messages[:-1]
    return dataclasses.replace(record, id=record.problem, messages=messages, answer=answer)
