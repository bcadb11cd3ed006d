"""The rows that pass from stage to stage: one chain each, as plain dicts that training reads as they are.

    id, problem_id      stable names of the chain and of its problem
    messages            the problem's turns, then the assistant's with content and reasoning_content
    prompt              in place of messages, for a problem that has no chain yet
    answer              the reference answer
    source              label of the source
    teacher             who wrote the chain; tokens: its length as the teacher counted it
    correct             true, false, or absent where it is not known
    Reasoning_Verbosity, Cognitive_Difficulty       labels from 0 to 9; absent where missing, never 0
    critique            easy, medium or hard for the student; suitable: true or false
    refined_from        the id of the chain that this one rewrites
    provenance          [{field, stage, by, prompt, sampling, time}]: what wrote which field; all texts

Every other column of the source passes through untouched.
"""

import dataclasses
import datetime
from collections.abc import Iterator, Mapping
from typing import Any

from dqjax.data.chat import Response
from dqjax.data.config import ColumnsConfig, SourceConfig
from dqjax.data.records import BadRow, Message, Record, parse_row
from dqjax.data.sources import Rejected, decode, merge_columns, read_rows
from dqjax.data.teacher import Reply, Request
from dqjax.rewards.types import Completion

Row = dict[str, Any]

VERBOSITY, DIFFICULTY = "Reasoning_Verbosity", "Cognitive_Difficulty"


def read_chain_rows(source: SourceConfig, columns: ColumnsConfig = ColumnsConfig()) -> Iterator[Row | Rejected]:
    """The rows of a source of any form that training knows, one a chain; OmniThought's problems come apart."""
    columns, label = merge_columns(columns, source.columns), source.label
    for raw in read_rows(source):
        try:
            value = decode(raw)
            parsed = parse_row(value, columns=columns, source="" if "source" in value else label)
        except BadRow as bad:
            parsed = [bad]
        for item in parsed:
            if isinstance(item, BadRow):
                yield Rejected(raw.file, raw.line, str(item))
            else:
                yield row_of(item, value)


def row_of(record: Record, raw: Mapping[str, Any]) -> Row:
    """The record as a stage row. A label that `parse_row` took for the difficulty keeps its own column as well."""
    row = record.to_row()
    row.setdefault("problem_id", record.problem)
    if DIFFICULTY in raw:
        row.setdefault(DIFFICULTY, raw[DIFFICULTY])
    if "thought_correctness_verify" in row and "correct" not in row:  # OmniThought's own verification
        row["correct"] = bool(row["thought_correctness_verify"])
    return row


def record_of(row: Row) -> Record:
    """The row as training and graders see it; raises `BadRow`."""
    (record,) = parse_row(row)
    if isinstance(record, BadRow):
        raise record
    return record


def prompt_turns(row: Row) -> list[Message]:
    """The turns before the answer."""
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    return [Message(t["role"], t["content"], t.get("reasoning_content")) for t in turns]


def question_of(row: Row) -> str:
    """All that the user says."""
    return "\n".join(m.content for m in prompt_turns(row) if m.role == "user")


def has_chain(row: Row) -> bool:
    """The row ends with an assistant's turn."""
    return bool(row.get("messages")) and row["messages"][-1]["role"] == "assistant"


def thought_of(row: Row) -> str | None:
    """The chain; None where the answer has none."""
    return row["messages"][-1].get("reasoning_content")


def solution_of(row: Row) -> str:
    """What follows the chain."""
    return row["messages"][-1]["content"]


def chain_text(row: Row) -> str:
    """Chain and solution, as judges read them."""
    thought = thought_of(row)
    return solution_of(row) if thought is None else f"{thought}\n\n{solution_of(row)}"


def with_answer(row: Row, thought: str | None, solution: str) -> Row:
    """A copy of the row with another answer behind the same problem."""
    said = {"role": "assistant", "content": solution}
    if thought is not None:
        said["reasoning_content"] = thought
    turns = row["prompt"] if "prompt" in row else row["messages"][:-1]
    copy = {key: value for key, value in row.items() if key != "prompt"}
    return copy | {"messages": [*turns, said]}


def completion_of(row: Row) -> Completion:
    """The chain as graders see it, its problem without it."""
    thought, solution, record = thought_of(row), solution_of(row), record_of(row)
    text = solution if thought is None else f"<think>\n{thought}\n</think>\n\n{solution}"
    return Completion(
        problem=dataclasses.replace(record, messages=record.messages[:-1]),
        text=text,
        response=Response(thought, solution, True),
        tokens=row.get("tokens") or 0,
        thinking=thought is not None,
    )


def label_of(row: Row, name: str) -> float | None:
    """RV or CD; None where it is missing or out of range."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 9:
        return None
    return float(value)


def note(
    row: Row, field: str, stage: str, by: str, *, request: Request | None = None, reply: Reply | None = None
) -> Row:
    """The row with the provenance of `field`; an older note of the same field is replaced.

    Args:
      by: the model, or the code that decided.
      request, reply: the call behind it, for prompt version, sampling parameters and time.
    """
    entry = {
        "field": field,
        "stage": stage,
        "by": by,
        "prompt": request.prompt if request else "",
        "sampling": request.sampling.as_text if request else "",
        "time": _iso(reply.time) if reply else "",
    }
    older = [e for e in row.get("provenance") or [] if e["field"] != field]
    return row | {"provenance": [*older, entry]}


def _iso(unix: float) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).isoformat(timespec="seconds")
