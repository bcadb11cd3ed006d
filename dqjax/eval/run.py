"""The evaluation itself: sample, grade, write one line a sample, go on where an interrupted one stopped."""

import dataclasses
import itertools
import json
import logging
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dqjax.config import ConfigError
from dqjax.data.records import Record
from dqjax.eval.samplers import Request, Sampled, Sampler, sample_seed
from dqjax.rewards.correct import RIGHT, Correctness
from dqjax.rewards.types import Completion, Grade, Grader

log = logging.getLogger(__name__)

GRADED_TOGETHER = 64  # samples between two writes: what an interruption may lose

# Settings that decide which samples are wanted or how they are reported, not what a sample is.
EXTENSIBLE = ("samples", "k", "limit", "budgets", "level", "thinking")


@dataclasses.dataclass(frozen=True, slots=True)
class Graded:
    """A line of records.jsonl: one sample of one problem.

    Attributes:
      id, thinking, sample: which one it is.
      correct: the grade reached 0.99. failed: why there is no grade; such a sample counts as wrong.
      answer: what was read out of the text; detail: what the grader adds.
      tokens, thinking_tokens: lengths, thinking included in the first.
      seconds: wall time since the sample before it arrived: they add up to the time of generation.
    """

    id: str
    thinking: bool
    sample: int
    seed: int
    correct: bool
    score: float
    answer: str | None
    reference: str | None
    failed: str | None
    detail: str
    tokens: int
    thinking_tokens: int
    truncated: bool
    difficulty: float | None
    seconds: float
    text: str

    @property
    def key(self) -> tuple[str, bool, int]:
        return self.id, self.thinking, self.sample


def evaluate(
    sampler: Sampler,
    problems: Sequence[Record],
    *,
    samples: int = 1,
    modes: Sequence[bool] = (True,),
    seed: int = 0,
    grader: Grader | None = None,
    records: str | pathlib.Path | None = None,
    progress: bool = False,
) -> list[Graded]:
    """Samples and grades every problem; returns one `Graded` a sample, by mode, problem and sample.

    Args:
      modes: thinking on, off, or both.
      grader: by default `Correctness()`, which reads from each problem how it is graded.
      records: a jsonl file. Samples already in it are not drawn again; new ones are appended as they are graded.

    Raises:
      ConfigError: two problems of one id, or a broken records file.
    """
    ids = [p.id for p in problems]
    if twice := next((i for i in ids if ids.count(i) > 1), None) if len(set(ids)) < len(ids) else None:
        raise ConfigError(f"two problems have the id {twice!r}: their samples could not be told apart")
    wanted = [
        Request(problem, index, thinking, sample_seed(seed, problem.id, index))
        for thinking in modes
        for problem in problems
        for index in range(samples)
    ]
    done = {graded.key: graded for graded in read_records(records)} if records is not None else {}
    todo = [request for request in wanted if request.key not in done]
    if done and todo:
        log.info("%d of %d samples are there already", len(wanted) - len(todo), len(wanted))
    own = Correctness() if grader is None else None
    try:
        for graded in _run(sampler, todo, grader or own, records, progress):
            done[graded.key] = graded
    finally:
        if own is not None:
            own.close()
    return [done[request.key] for request in wanted]


def _run(
    sampler: Sampler, todo: Sequence[Request], grader: Grader, records: str | pathlib.Path | None, progress: bool
) -> Iterator[Graded]:
    if not todo:
        return
    stream = open(records, "a", encoding="utf-8") if records is not None else None  # noqa: SIM115
    bar = tqdm(total=len(todo), unit="sample", disable=not (progress and sys.stderr.isatty()), dynamic_ncols=True)
    try:
        arriving = zip(todo, _timed(sampler(todo)), strict=True)
        while chunk := list(itertools.islice(arriving, GRADED_TOGETHER)):
            grades = grader([completion_of(request, sampled) for request, (sampled, _) in chunk])
            for (request, (sampled, seconds)), grade in zip(chunk, grades, strict=True):
                graded = _graded(request, sampled, grade, seconds)
                if stream is not None:
                    stream.write(json.dumps(dataclasses.asdict(graded), ensure_ascii=False) + "\n")
                yield graded
            if stream is not None:
                stream.flush()
            bar.update(len(chunk))
    finally:
        bar.close()
        if stream is not None:
            stream.close()


def _timed(samples: Iterator[Sampled]) -> Iterator[tuple[Sampled, float]]:
    while True:
        began = time.perf_counter()
        try:
            sampled = next(samples)
        except StopIteration:
            return
        yield sampled, time.perf_counter() - began


def completion_of(request: Request, sampled: Sampled) -> Completion:
    """What graders are shown of a sample."""
    return Completion(
        problem=request.problem,
        text=sampled.text,
        response=sampled.response,
        tokens=sampled.tokens,
        truncated=sampled.truncated,
        thinking=request.thinking,
        opened=sampled.opened,
    )


def _graded(request: Request, sampled: Sampled, grade: Grade, seconds: float) -> Graded:
    return Graded(
        id=request.problem.id,
        thinking=request.thinking,
        sample=request.index,
        seed=request.seed,
        correct=grade.failed is None and grade.score >= RIGHT,
        score=grade.score,
        answer=grade.answer,
        reference=request.problem.answer,
        failed=grade.failed,
        detail=grade.detail,
        tokens=sampled.tokens,
        thinking_tokens=sampled.thinking_tokens,
        truncated=sampled.truncated,
        difficulty=request.problem.difficulty,
        seconds=round(seconds, 4),
        text=sampled.text,
    )


def read_records(path: str | pathlib.Path) -> list[Graded]:
    """The samples of a records file; a last line cut short by a kill is removed from the file.

    Raises:
      ConfigError: a line that is not a record, with its number.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        data = data[: data.rfind(b"\n") + 1]
        with path.open("r+b") as stream:
            stream.truncate(len(data))
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            found.append(Graded(**json.loads(line)))
        except (ValueError, TypeError) as e:
            raise ConfigError(f"{path}:{number}: not a record of an evaluation ({e}); move the file away") from None
    return found


def claim_folder(out: str | pathlib.Path, settings: Mapping[str, Any]) -> pathlib.Path:
    """Makes the output folder, or takes up one whose samples were drawn under the same settings.

    Raises:
      ConfigError: the folder holds an evaluation with other settings; names them.
    """
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    settings = json.loads(json.dumps(settings, default=str))
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise ConfigError(f"{path} is not valid JSON ({e}); use another --out") from None
        keys = [k for k in sorted(before.keys() | settings.keys()) if k not in EXTENSIBLE]
        if changed := [k for k in keys if before.get(k) != settings.get(k)]:
            what = ", ".join(f"{k} was {before.get(k)!r}, is {settings.get(k)!r}" for k in changed[:3])
            raise ConfigError(f"{out} holds an evaluation with other settings ({what}); use another --out")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)
    return out
