"""What a set of preference pairs claims and may not keep: that the rejected answer is the worse one."""

import logging
from collections.abc import Sequence

from dqjax.data.chat import Response
from dqjax.data.reading import Item
from dqjax.data.records import Record
from dqjax.rewards.answer import AnswerGrader
from dqjax.rewards.correct import RIGHT
from dqjax.rewards.types import Completion

log = logging.getLogger(__name__)

BOTH_RIGHT = {"kind": ("style", "quality"), "gap": ("small",)}
"""Columns that say of a pair that its rejected answer may be right: it was rejected for something else."""


def report_right_rejected(pairs: Sequence[Item]) -> int:
    """Counts the pairs whose rejected answer reaches the reference, and warns with the first of them.

    Looked at are pairs with an `answer` column, but for those that are meant so (`BOTH_RIGHT`); an answer that cannot
    be graded counts as wrong.
    """
    asked = [pair for pair in pairs if pair.record.answer is not None and not _meant(pair.record)]
    if not asked:
        return 0
    with AnswerGrader() as grader:
        grades = grader([_rejected(pair.record) for pair in asked])
    right = [pair for pair, grade in zip(asked, grades, strict=True) if grade.score >= RIGHT]
    if right:
        log.warning(
            "%d of %d rejected answers reach the reference answer: these pairs teach against a right answer; the first is "
            "%s at %s",
            *(len(right), len(asked), right[0].record.id, right[0].where),
        )
    return len(right)


def _meant(record: Record) -> bool:
    return any(record.extra.get(column) in values for column, values in BOTH_RIGHT.items())


def _rejected(record: Record) -> Completion:
    said = record.rejected
    return Completion(record, said.content, Response(said.reasoning, said.content, True), tokens=0)
