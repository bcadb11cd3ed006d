"""Correctness of chains: by the graders of `rewards`, by the tests of code problems, or by a judge."""

import asyncio
from typing import Literal

import pydantic

from dqjax.config import Section
from dqjax.data.chain_rows import Row, completion_of, has_chain, note, question_of, record_of, solution_of
from dqjax.data.prompt import load_prompt
from dqjax.data.replies import answer_of, read_integer
from dqjax.data.stage import Job, Out, rejection, together
from dqjax.data.teacher import CallFailed, Request, SamplingConfig
from dqjax.rewards.correct import RIGHT, CorrectConfig, Correctness, grader_of
from dqjax.rewards.types import Completion, Grade

HELP = "say which chains reach the reference answer: graders, code tests, or a judge"


class Config(Section):
    """verify.

    by: `graders` (rules and code tests), `judge` (a teacher compares with the reference), or `auto`: graders, and the
      judge for what they cannot grade.
    judge: the teacher's name; needed for `judge`, optional for `auto`.
    keep: which rows go on: all of them, or the correct ones.
    """

    by: Literal["auto", "graders", "judge"] = "auto"
    judge: str | None = None
    judge_prompt: str = "judge"
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=4096)
    grading: CorrectConfig = CorrectConfig()
    keep: Literal["all", "correct"] = "all"

    @pydantic.model_validator(mode="after")
    def _judge_is_named(self):
        if self.by == "judge" and self.judge is None:
            raise ValueError("judge: name the teacher that judges, or set by: graders")
        return self


class Verifier:
    """Grades chains; safe to ask from many coroutines at once, whose rows are then graded together."""

    def __init__(self, grading: CorrectConfig):
        self._grader = Correctness(grading)
        self._waiting: list[tuple[Completion, asyncio.Future[Grade]]] = []
        self._worker: asyncio.Task | None = None

    def grade(self, rows: list[Row]) -> list[Grade]:
        """One grade a row; `failed` is set where there is none."""
        return self._grader([completion_of(row) for row in rows])

    async def grade_one(self, row: Row) -> Grade:
        """`grade`, together with what other coroutines ask meanwhile."""
        future: asyncio.Future[Grade] = asyncio.get_running_loop().create_future()
        self._waiting.append((completion_of(row), future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                grades = await asyncio.to_thread(self._grader, [completion for completion, _ in batch])
            except Exception as e:
                for _, future in batch:
                    future.set_exception(e)
                continue
            for (_, future), grade in zip(batch, grades):
                if not future.done():
                    future.set_result(grade)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._grader.close()


def run(config: Config, job: Job) -> None:
    """Writes `correct` where it can be known; a row that nobody can grade goes on without it, and is counted."""
    with Verifier(config.grading) as verifier:
        if config.judge is None or config.by == "graders":
            job.map_batches(lambda rows: _by_graders(rows, verifier, config, job))
            return
        template = load_prompt(config.judge_prompt)

        async def judged(row: Row) -> Out:
            if not has_chain(row):
                return rejection(row, "no chain to verify")
            grade = None if config.by == "judge" else await verifier.grade_one(row)
            if grade is not None and grade.failed is None:
                return _kept(_graded(row, grade, job), config)
            if row.get("answer") is None:
                return _kept(_ungraded(row, "no reference answer", job), config)
            fields = {"question": question_of(row), "answer": str(row["answer"]), "solution": solution_of(row)}
            request = Request(template(**fields), config.sampling, prompt=template.label)
            try:
                reply = await job.teacher(config.judge).ask(request)
            except CallFailed as e:
                return _kept(_ungraded(row, f"judge: {e}", job), config)
            verdict = read_integer(answer_of(reply), 0, 1)
            if verdict is None:
                return _kept(_ungraded(row, "the judge's reply is no verdict", job), config)
            made = row | {"correct": bool(verdict)}
            return _kept(note(made, "correct", job.name, reply.model, request=request, reply=reply), config)

        async def transform(group: list[Row]) -> list[Out]:
            return await together(map(judged, group))

        job.map_async(transform, [config.judge])


def _by_graders(rows: list[Row], verifier: Verifier, config: Config, job: Job) -> list[Out]:
    ready = [row for row in rows if has_chain(row)]
    grades = iter(verifier.grade(ready))
    outs: list[Out] = []
    for row in rows:
        if not has_chain(row):
            outs.append(rejection(row, "no chain to verify"))
            continue
        grade = next(grades)
        made = _graded(row, grade, job) if grade.failed is None else _ungraded(row, grade.failed, job)
        outs.append(_kept(made, config))
    return outs


def _graded(row: Row, grade: Grade, job: Job) -> Row:
    job.counts["correct" if grade.score >= RIGHT else "incorrect"] += 1
    return note(row | {"correct": grade.score >= RIGHT}, "correct", job.name, f"grader {grader_of(record_of(row))}")


def _ungraded(row: Row, reason: str, job: Job) -> Row:
    job.counts["correctness missing"] += 1
    job.counts[f"correctness missing: {reason[:60]}"] += 1
    return {key: value for key, value in row.items() if key != "correct"}


def _kept(row: Row, config: Config) -> Out:
    if config.keep == "correct" and row.get("correct") is not True:
        return rejection(row, "incorrect" if row.get("correct") is False else "correctness missing")
    return row
