r"""Benchmarks: readers of the users' own files, in the forms in which they are published.

    name           form of a row (jsonl, parquet; GPQA also csv)                       graded by
    aime2024       problem, answer (0 to 999), id                                      last box, number
    math500        problem, answer, unique_id, level, subject                          last box, math-verify
    gpqa_diamond   Question, Correct Answer, Incorrect Answer 1 to 3, Record ID        letter; choices shuffled by seed
    livecodebench  question_content, public_test_cases, private_test_cases, ...        all tests of the program
    humaneval      task_id, prompt, entry_point, test                                  its asserts
    tasks          reasoning-gym sources, from the config                              the tasks' own scorers
    FILE           any form with a question and a reference answer that training reads by its columns

All rows are checked before anything is generated: a missing column, a wrong type or an id that occurs twice is refused,
with file and line.
"""

import base64
import csv
import dataclasses
import datetime
import difflib
import io
import json
import pathlib
import pickle
import random
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dqjax.config import ConfigError
from dqjax.data.config import FILE_SUFFIXES, ColumnsConfig, SourceConfig
from dqjax.data.records import BadRow, Message, Record
from dqjax.data.sources import RawRow, parse_raw, read_rows, source_files
from dqjax.eval.config import EvalConfig

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen's model cards

# https://github.com/openai/simple-evals, common.py
GPQA_HEAD = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before answering."
)

# https://github.com/LiveCodeBench/LiveCodeBench, lcb_runner/prompts/code_generation.py
CODE_HEAD = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests."
)
CODE_STARTER = "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
CODE_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)

MAX_COMPLAINTS = 10
MAX_TESTS_BYTES = 1 << 30  # a problem's unpacked private tests


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a published file becomes problems.

    Attributes:
      parse: a checked row → the problem's record.
      columns: required columns and the types they may have.
      instruction: added to the question where the config gives none.
      spellings: other names under which a column is published.
    """

    parse: Callable[[Mapping[str, Any], EvalConfig], Record]
    columns: Mapping[str, tuple[type, ...]]
    instruction: str = ""
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_problems(config: EvalConfig, *, bare: bool = False) -> list[Record]:
    """The problems of a benchmark, with prompts as they will be asked.

    Args:
      bare: without the config's instruction and system prompt.

    Raises:
      ConfigError: no such benchmark or file; or rows that cannot be used, each with file and line.
    """
    if config.benchmark == "tasks":
        problems = _read_tasks(config)
    elif config.benchmark in BENCHMARKS:
        problems = _read_published(config)
    else:
        problems = _read_plain(config)
    if not problems:
        raise ConfigError(f"{config.benchmark} has no problems" + (" in these dates" if config.released else ""))
    problems = problems[: config.limit]
    return problems if bare else [_ask(problem, config) for problem in problems]


def benchmark_files(config: EvalConfig) -> list[pathlib.Path]:
    """The files that the problems are read from; none for reasoning-gym."""
    if config.benchmark == "tasks":
        return []
    return source_files(config.file if config.benchmark in BENCHMARKS else config.benchmark)


def _ask(problem: Record, config: EvalConfig) -> Record:
    """The problem with the instruction behind its last question and the system prompt in front."""
    benchmark = BENCHMARKS.get(config.benchmark)
    instruction = config.instruction if config.instruction is not None else benchmark.instruction if benchmark else ""
    messages = list(problem.messages)
    if instruction:
        messages[-1] = dataclasses.replace(messages[-1], content=f"{messages[-1].content}\n\n{instruction}")
    if config.system:
        messages = [Message("system", config.system), *(m for m in messages if m.role != "system")]
    return dataclasses.replace(problem, messages=tuple(messages))


# Reading rows, and saying what is wrong with them.


class _Problems:
    """Collects problems, and complaints with their places; ends with one or the other."""

    def __init__(self):
        self.found: dict[str, Record] = {}
        self._where: dict[str, str] = {}
        self._complaints: list[str] = []

    def add(self, where: str, read: Callable[[], Record | None]) -> None:
        try:
            problem = read()
            if problem is None:
                return
            if problem.id in self.found:
                raise BadRow(f"id {problem.id!r} is that of {self._where[problem.id]} too")
        except BadRow as bad:
            self._complaints.append(f"{where}: {bad}")
            return
        self.found[problem.id], self._where[problem.id] = problem, where

    def finish(self) -> list[Record]:
        if self._complaints:
            more = len(self._complaints) - MAX_COMPLAINTS
            tail = [f"and {more} more"] if more > 0 else []
            raise ConfigError("\n".join(["unusable problems:", *self._complaints[:MAX_COMPLAINTS], *tail]))
        return list(self.found.values())


def _read_published(config: EvalConfig) -> list[Record]:
    if config.file is None:
        raise ConfigError(
            f"benchmark {config.benchmark}: give its file with --file (the README says where it comes from)"
        )
    benchmark, problems = BENCHMARKS[config.benchmark], _Problems()
    for file in source_files(config.file) if not config.file.endswith(".csv") else [pathlib.Path(config.file)]:
        for raw in _csv_rows(file) if file.suffix == ".csv" else read_rows(SourceConfig(path=str(file))):
            problems.add(f"{raw.file}:{raw.line}", lambda raw=raw: _published(raw, benchmark, config))
    return problems.finish()


def _published(raw: RawRow, benchmark: Benchmark, config: EvalConfig) -> Record | None:
    row = raw.value
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except ValueError as e:
            raise BadRow(f"not valid JSON: {e}") from None
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with columns, got {type(row).__name__}")
    row = {benchmark.spellings.get(name, name): value for name, value in row.items()}
    for name, types in benchmark.columns.items():
        if row.get(name) is None:
            near = difflib.get_close_matches(name, row, 1, 0.6)
            raise BadRow(
                f"no column {name!r}" + (f"; is it {near[0]!r}?" if near else f" among {', '.join(sorted(row))}")
            )
        if not isinstance(row[name], types) or isinstance(row[name], bool):
            expected = " or ".join(t.__name__ for t in types)
            raise BadRow(f"{name}: expected {expected}, got {type(row[name]).__name__} {str(row[name])[:40]!r}")
        if row[name] == "":
            raise BadRow(f"{name}: empty")
    return benchmark.parse(row, config)


def _csv_rows(file: pathlib.Path) -> Iterator[RawRow]:
    if not file.is_file():
        raise ConfigError(f"no data file at {file}")
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        line = 2
        for row in reader:
            yield RawRow(str(file), line, row)
            line = reader.line_num + 1


def _read_plain(config: EvalConfig) -> list[Record]:
    name = config.benchmark
    if not name.endswith(FILE_SUFFIXES) and not pathlib.Path(name).exists():
        near = difflib.get_close_matches(name, [*BENCHMARKS, "tasks"], 1, 0.5)
        raise ConfigError(
            f"no benchmark and no file {name!r}"
            + (f"; did you mean {near[0]}?" if near else f"; benchmarks: {', '.join([*BENCHMARKS, 'tasks'])}")
        )
    return _read_source(SourceConfig(path=name), ColumnsConfig())


def _read_tasks(config: EvalConfig) -> list[Record]:
    if not config.tasks:
        raise ConfigError(
            "benchmark tasks: name its sources under tasks: (- {task: chain_sum, seed: 1000000, size: 200})"
        )
    return [record for source in config.tasks for record in _read_source(source, source.columns)]


def _read_source(source: SourceConfig, columns: ColumnsConfig) -> list[Record]:
    problems = _Problems()
    for raw in read_rows(source):
        problems.add(f"{raw.file}:{raw.line}", lambda raw=raw: _plain(raw, columns, source.label))
    return problems.finish()


def _plain(raw: RawRow, columns: ColumnsConfig, label: str) -> Record:
    """A row of any training form as a problem: its last answer, if it has one, is taken off and serves as the reference."""
    record = parse_raw(raw, columns, label)[0]
    messages, answer = record.messages, record.answer
    if messages[-1].role == "assistant":
        answer = messages[-1].content if answer is None else answer
        messages = messages[:-1]
    if answer is None and "tests" not in record.extra:
        raise BadRow("no reference answer: expected a text or a number in a column answer, or tests for a program")
    return dataclasses.replace(record, id=record.problem, messages=messages, answer=answer)


# The published forms.


def _problem(id: Any, question: str, answer: str | None, source: str, **more: Any) -> Record:
    return Record(str(id), (Message("user", question),), str(id), source=source, answer=answer, **more)


def _aime(row: Mapping[str, Any], config: EvalConfig) -> Record:
    answer = str(row["answer"]).strip()
    if not answer.isdecimal() or int(answer) > 999:
        raise BadRow(f"answer: expected a whole number from 0 to 999, got {answer!r}")
    return _problem(row["id"], row["problem"], str(int(answer)), "aime2024", extra={"answer_kind": "math"})


def _math(row: Mapping[str, Any], config: EvalConfig) -> Record:
    if not 1 <= row["level"] <= 5:
        raise BadRow(f"level: expected 1 to 5, got {row['level']}")
    return _problem(
        row["unique_id"],
        row["problem"],
        row["answer"],
        "math500",
        difficulty=float(row["level"]),
        extra={"subject": row["subject"]},
    )


def _gpqa(row: Mapping[str, Any], config: EvalConfig) -> Record:
    right = row["Correct Answer"].strip()
    choices = [right, *(row[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
    # The right answer stands first in every published row. The order depends on the row alone, not on the others.
    random.Random(f"{config.seed}/{row['Record ID']}").shuffle(choices)
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip("ABCD", choices))
    question = f"{GPQA_HEAD}\n\n{row['Question'].strip()}\n\n{listed}"
    return _problem(
        row["Record ID"], question, "ABCD"[choices.index(right)], "gpqa_diamond", extra={"choices": choices}
    )


def _livecodebench(row: Mapping[str, Any], config: EvalConfig) -> Record | None:
    try:
        date = datetime.date.fromisoformat(row["contest_date"][:10])
    except ValueError:
        raise BadRow(f"contest_date: expected a day as YYYY-MM-DD, got {row['contest_date']!r}") from None
    if config.released and not config.released[0] <= date.isoformat() <= config.released[1]:
        return None
    cases = _tests(row["public_test_cases"], "public_test_cases") + _tests(
        row["private_test_cases"], "private_test_cases"
    )
    kinds = {case["testtype"] for case in cases}
    if len(kinds) != 1 or not kinds <= {"stdin", "functional"}:
        raise BadRow(f"testtype: expected all stdin or all functional, got {sorted(map(str, kinds)) or 'no tests'}")
    plain = [{"input": case["input"], "output": case["output"]} for case in cases]
    tests: dict[str, Any] = {"form": "stdin", "cases": plain}
    starter, format = row.get("starter_code") or "", CODE_STDIN
    if kinds == {"functional"}:
        name = _json(row.get("metadata") or "{}", "metadata").get("func_name")
        if not name or not starter:
            raise BadRow("functional tests need metadata.func_name and starter_code")
        tests, format = {"form": "call", "function": name.split(".")[-1], "cases": plain}, CODE_STARTER
    question = (
        f"{CODE_HEAD}\n\n### Question:\n{row['question_content'].strip()}\n\n### Format: {format}\n"
        f"```python\n{starter or '# YOUR CODE HERE'}\n```\n\n### Answer: (use the provided format with backticks)"
    )
    level = {"easy": 1.0, "medium": 2.0, "hard": 3.0}.get(str(row.get("difficulty", "")).lower())
    extra = {"tests": tests, "date": date.isoformat()}
    return _problem(row["question_id"], question, None, "livecodebench", difficulty=level, extra=extra)


def _humaneval(row: Mapping[str, Any], config: EvalConfig) -> Record:
    question = (
        "Complete the following Python function. Answer with the whole program, imports included, in one ```python block.\n\n"
        f"```python\n{row['prompt'].rstrip()}\n```"
    )
    tests = {"form": "assert", "function": row["entry_point"], "code": row["test"], "head": row["prompt"]}
    return _problem(row["task_id"], question, None, "humaneval", extra={"tests": tests})


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as e:
        raise BadRow(f"{name}: not valid JSON: {e}") from None


class _TextOnly(pickle.Unpickler):
    """Reads a pickled text; anything that names a class or function is refused, so nothing in a file can run."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it holds {module}.{name}; only text is read")


def _tests(text: str, name: str) -> list[Mapping[str, str]]:
    """A list of tests: JSON, or JSON that was pickled, compressed and written in base64, as LiveCodeBench publishes it."""
    try:
        cases = json.loads(text)
    except ValueError:
        try:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
            if unpacker.unconsumed_tail:
                raise BadRow(f"{name}: more than {MAX_TESTS_BYTES >> 20} MiB unpacked")
            cases = json.loads(_TextOnly(io.BytesIO(data)).load())
        except BadRow:
            raise
        except Exception as e:  # base64, zlib, pickle and json have an error class each, and pickle raises others too
            raise BadRow(f"{name}: neither JSON nor packed tests: {e}") from None
    if not isinstance(cases, Sequence) or isinstance(cases, str):
        raise BadRow(f"{name}: expected a list of tests, got {type(cases).__name__}")
    for i, case in enumerate(cases):
        if not isinstance(case, Mapping) or not all(
            isinstance(case.get(k), str) for k in ("input", "output", "testtype")
        ):
            raise BadRow(f"{name}[{i}]: expected input, output and testtype as texts")
    return list(cases)


TEXT = (str,)

BENCHMARKS: dict[str, Benchmark] = {
    "aime2024": Benchmark(
        _aime,
        {"id": (str, int), "problem": TEXT, "answer": (str, int)},
        instruction=BOXED,
        spellings={"ID": "id", "Problem": "problem", "Answer": "answer"},
    ),
    "math500": Benchmark(
        _math,
        {"unique_id": TEXT, "problem": TEXT, "answer": TEXT, "level": (int,), "subject": TEXT},
        instruction=BOXED,
    ),
    "gpqa_diamond": Benchmark(
        _gpqa,
        {"Record ID": TEXT, "Question": TEXT, "Correct Answer": TEXT}
        | {f"Incorrect Answer {i}": TEXT for i in (1, 2, 3)},
    ),
    "livecodebench": Benchmark(
        _livecodebench,
        {"question_id": TEXT, "question_content": TEXT, "contest_date": TEXT}
        | {"public_test_cases": TEXT, "private_test_cases": TEXT},
    ),
    "humaneval": Benchmark(
        _humaneval,
        {"task_id": TEXT, "prompt": TEXT, "entry_point": TEXT, "test": TEXT},
    ),
}
