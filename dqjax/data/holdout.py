"""Rows into a training and a validation file, by problem: no question is on both sides, however many chains it has.

The training file is the step's output, `OUT.jsonl`; beside it stand `OUT.validation.jsonl` and, with `messages`, both
files once more in the form that other trainers read: role and content alone, the chain between `<think>` tags.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import pydantic

from dqjax.config import ConfigError, Section
from dqjax.data.chain_rows import Row, record_of
from dqjax.data.records import question_key
from dqjax.data.stage import Job, Out
from dqjax.data.writing import RowWriter

HELP = "hold out validation problems; write training files, also as plain messages"


class Config(Section):
    """split.

    validation: problems to hold out: a share (0.05), which is one problem at least, or a number (200).
    seed: of the draw.
    drop: columns that training does not read, and whose types differ from row to row.
    messages: also write the files for other trainers.
    """

    validation: int | float = pydantic.Field(0.05, ge=0)
    seed: int = 0
    drop: tuple[str, ...] = ("metadata", "tests")
    messages: bool = True


def run(config: Config, job: Job) -> None:
    """Raises ConfigError where one side would be empty."""
    job.refuse_shard("split")
    keys = np.fromiter((question_key(record_of(row)) for group in job.groups() for row in group), np.int64)
    job.counts.clear()
    questions = np.unique(keys)
    number, share = isinstance(config.validation, int), config.validation * len(questions)
    held = int(config.validation) if number or not share else max(round(share), 1)
    if held >= len(questions):
        raise ConfigError(
            f"split: {len(questions)} problems, of which {held} would be held out; set another validation"
        )
    validation = set(np.random.default_rng(config.seed).permutation(questions)[:held].tolist())
    beside = {
        name: job.output.with_name(f"{job.output.stem}.{name}{job.output.suffix}")
        for name in ("validation", *(("messages", "validation.messages") if config.messages else ()))
    }
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(RowWriter(path)) for name, path in beside.items()}

        def transform(rows: Sequence[Row]) -> list[Out]:
            train: list[Out] = []
            for row in rows:
                inside = question_key(record_of(row)) in validation
                row = {key: value for key, value in row.items() if key not in config.drop}
                job.counts["validation" if inside else "train"] += 1
                if config.messages:
                    files["validation.messages" if inside else "messages"].write(plain_row(row))
                files["validation"].write(row) if inside else train.append(row)
            return train

        job.map_batches(transform)


def plain_row(row: Row) -> Row:
    """id and messages of a row, or id, prompt, chosen and rejected, with nothing in a message but role and content."""
    names = [name for name in ("prompt", "messages", "chosen", "rejected") if name in row]
    return {"id": row["id"]} | {name: [plain_message(m) for m in row[name]] for name in names}


def plain_message(message: Row) -> dict[str, str]:
    """The chain goes into the content, between the tags that Qwen3's template writes."""
    thought = message.get("reasoning_content")
    content = message["content"] if thought is None else f"<think>\n{thought}\n</think>\n\n{message['content']}"
    return {"role": message["role"], "content": content}
