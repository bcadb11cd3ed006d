"""Critique, rethink, verify: chains brought to what a student can follow.

CRV (Cai et al. 2025, "Training Small Reasoning LLMs with Cognitive Preference Alignment") [S]: a critic that plays the
student rates each correct chain easy (steps skipped), medium or hard. A rethinker expands easy ones and simplifies hard
ones; medium ones stay. The verifier accepts a rewritten chain that still reaches the reference answer; another goes
back to the rethinker, a bounded number of times.

Ours [D]: the unsuitable original stays in the file with `suitable: false`, which `select` leaves out and `pairs` needs;
the chain that could not be rewritten is rejected and counted.
"""

from collections.abc import Callable

import pydantic

from dqjax.config import Section
from dqjax.data.chain_rows import Row, chain_text, has_chain, note, question_of, solution_of, thought_of, with_answer
from dqjax.data.prompt import Prompt, load_prompt
from dqjax.data.replies import Unusable, answer_of, read_word, split_reply
from dqjax.data.stage import Job, Out, Rejection, failure, together
from dqjax.data.teacher import CallFailed, Request, SamplingConfig
from dqjax.data.verify import Verifier
from dqjax.rewards.correct import RIGHT, CorrectConfig

HELP = "critique, rethink and verify: expand chains too easy for the student, simplify those too hard"
RATINGS = ("easy", "medium", "hard")


class Config(Section):
    """refine.

    critic, rethinker: teachers; the critic plays the student, described by `student`.
    attempts: rewrites of a chain at most, until one is verified.
    critic_sampling, sampling: of the critic and the rethinker.
    grading: as in verify.
    """

    critic: str
    rethinker: str
    student: str = "a small language model that follows explicit steps well, and loses its way in leaps of thought."
    attempts: int = pydantic.Field(3, ge=1)
    critic_sampling: SamplingConfig = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=4096)
    sampling: SamplingConfig = SamplingConfig()
    critique_prompt: str = "critique"
    easy_prompt: str = "rethink_expand"
    hard_prompt: str = "rethink_simplify"
    grading: CorrectConfig = CorrectConfig()


class Rewriter:
    """Asks for a rewritten chain until a verified one comes, a bounded number of times.

    Called with a row, a prompt, the id of the new row, `accept` (which returns the reason why a verified row will not
    do, or None) and more fields for the prompt.
    """

    def __init__(self, job: Job, teacher: str, verifier: Verifier, sampling: SamplingConfig, attempts: int):
        self._job, self._teacher, self._verifier = job, teacher, verifier
        self._sampling, self._attempts = sampling, attempts

    async def __call__(
        self,
        row: Row,
        template: Prompt,
        id: str,
        *,
        accept: Callable[[Row], str | None] = lambda row: None,
        **fields: str,
    ) -> Out:
        said = {"question": question_of(row), "thought": thought_of(row) or "", "solution": solution_of(row)}
        request = Request(template(**said, **fields), self._sampling, prompt=template.label)
        reason = "never asked"
        for attempt in range(self._attempts):
            request = Request(request.messages, self._sampling, attempt, template.label)
            try:
                reply = await self._job.teacher(self._teacher).ask(request)
            except CallFailed as e:
                return failure(row, e, id)
            try:
                thought, solution = split_reply(reply)
            except Unusable as e:
                reason = f"rewritten chain: {e}"
                continue
            if thought is None:
                reason = "rewritten chain: no think block in the reply"
                continue
            made = with_answer(row, thought, solution)
            grade = await self._verifier.grade_one(made)
            if grade.failed is not None or grade.score < RIGHT:
                reason = "rewritten chain: no longer reaches the reference answer"
                continue
            made |= {"id": id, "teacher": self._teacher, "correct": True, "tokens": reply.completion_tokens}
            made |= {"refined_from": row["id"]}
            # Labels were given to the other chain.
            for stale in ("Reasoning_Verbosity", "Cognitive_Difficulty"):
                made.pop(stale, None)
            if (refused := accept(made)) is not None:
                reason = f"rewritten chain: {refused}"
                continue
            self._job.counts[f"verified at attempt {attempt + 1}"] += 1
            return note(made, "messages", self._job.name, reply.model, request=request, reply=reply)
        return Rejection(id, row["problem_id"], reason)


def run(config: Config, job: Job) -> None:
    """Rates every correct chain; adds `ID~refined` for each that was rewritten."""
    critique = load_prompt(config.critique_prompt)
    rethink = {"easy": load_prompt(config.easy_prompt), "hard": load_prompt(config.hard_prompt)}
    with Verifier(config.grading) as verifier:
        rewrite = Rewriter(job, config.rethinker, verifier, config.sampling, config.attempts)

        async def refined(row: Row) -> list[Out]:
            if not has_chain(row) or thought_of(row) is None or row.get("correct") is not True:
                return [row]
            messages = critique(question=question_of(row), chain=chain_text(row), student=config.student)
            request = Request(messages, config.critic_sampling, prompt=critique.label)
            try:
                reply = await job.teacher(config.critic).ask(request)
            except CallFailed:
                rating = None
            else:
                rating = read_word(answer_of(reply), RATINGS)
            job.counts[f"critique {rating or 'missing'}"] += 1
            if rating is None:
                return [row]
            rated = note(row | {"critique": rating}, "critique", job.name, reply.model, request=request, reply=reply)
            if rating == "medium":
                return [rated | {"suitable": True}]
            better = await rewrite(row, rethink[rating], f"{row['id']}~refined", student=config.student)
            if isinstance(better, Rejection):
                return [rated | {"suitable": False}, better]
            return [rated | {"suitable": False}, better | {"suitable": True}]

        async def transform(group: list[Row]) -> list[Out]:
            return [out for outs in await together(map(refined, group)) for out in outs]

        job.map_async(transform, [config.critic, config.rethinker])
