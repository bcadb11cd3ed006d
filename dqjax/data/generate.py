"""Chains for problems: n of each teacher, taken apart into thought and solution."""

from typing import Any

import pydantic

from dqjax.config import Section
from dqjax.data.chain_rows import Row, note, prompt_turns, with_answer
from dqjax.data.prompt import load_prompt
from dqjax.data.replies import Unusable, split_reply
from dqjax.data.stage import Job, Out, Rejection, failure, together
from dqjax.data.teacher import CallFailed, Request, SamplingConfig

HELP = "ask teachers for chains: n a problem and teacher"


class Config(Section):
    """generate.

    teachers: names. chains: of each teacher, a problem.
    sampling: of the chains.
    prompt: a shipped prompt or a file; null sends the problem's turns as they are.
    """

    teachers: tuple[str, ...] = pydantic.Field(min_length=1)
    chains: int = pydantic.Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    prompt: str | None = None


def run(config: Config, job: Job) -> None:
    """One row a chain, with id `PROBLEM#TEACHER/k`; what comes back unusable is rejected, never repaired."""
    template = load_prompt(config.prompt) if config.prompt else None

    async def chain(row: Row, teacher: str, k: int) -> Out:
        turns = prompt_turns(row)
        if template is not None:
            question = next(m.content for m in reversed(turns) if m.role == "user")
            turns = [m for m in turns[:-1] if m.role != "system" or not template.system] + list(
                template(question=question)
            )
        request = Request(tuple(turns), config.sampling, k, template.label if template else "")
        id = f"{row['problem_id']}#{teacher}/{k}"
        try:
            reply = await job.teacher(teacher).ask(request)
        except CallFailed as e:
            return failure(row, e, id)
        try:
            thought, solution = split_reply(reply)
        except Unusable as e:
            return Rejection(id, row["problem_id"], f"unusable chain: {e}")
        made: dict[str, Any] = {"id": id, "teacher": teacher, "tokens": reply.completion_tokens}
        made = with_answer(row, thought, solution) | made
        return note(made, "messages", job.name, reply.model, request=request, reply=reply)

    async def transform(group: list[Row]) -> list[Out]:
        asked = [chain(group[0], teacher, k) for teacher in config.teachers for k in range(config.chains)]
        return await together(asked)

    job.map_async(transform, config.teachers)
