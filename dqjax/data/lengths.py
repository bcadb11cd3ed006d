"""Chains rewritten shorter (long2short) or longer (short2long), each verified to reach the same answer."""

import dataclasses
from typing import Literal

import pydantic

from dqjax.config import Section
from dqjax.data.chain_rows import Row, has_chain, thought_of
from dqjax.data.prompt import load_prompt
from dqjax.data.refine import Rewriter
from dqjax.data.stage import Job, Out, Rejection, together
from dqjax.data.teacher import SamplingConfig
from dqjax.data.verify import Verifier
from dqjax.rewards.correct import CorrectConfig


class Config(Section):
    """long2short and short2long.

    teacher: who rewrites. attempts: rewrites of a chain at most.
    ratio: a shorter chain has at most this share of the original's characters, a longer one at least this multiple; by
      default 0.8 and 1.25.
    at_least, at_most: only chains of so many characters are rewritten; by default all.
    keep_original: the original goes on beside its rewritten form.
    """

    teacher: str
    attempts: int = pydantic.Field(3, ge=1)
    ratio: float | None = pydantic.Field(None, gt=0)
    at_least: int = pydantic.Field(0, ge=0)
    at_most: int | None = pydantic.Field(None, ge=1)
    keep_original: bool = False
    prompt: str | None = None
    sampling: SamplingConfig = SamplingConfig()
    grading: CorrectConfig = CorrectConfig()


@dataclasses.dataclass(frozen=True)
class Rewriting:
    """One direction as a stage (`stage.Stage`)."""

    direction: Literal["shorter", "longer"]
    Config = Config

    @property
    def HELP(self) -> str:
        return f"rewrite chains {self.direction}, each verified to reach the same answer"

    @property
    def __doc__(self) -> str:
        return f"Chains rewritten {self.direction}, each verified to reach the same answer."

    def run(self, config: Config, job: Job) -> None:
        """Adds `ID~shorter` or `ID~longer`; a chain that could not be rewritten stays, and its rewrite is rejected."""
        _rewrite_all(self.direction, config, job)


LONG2SHORT, SHORT2LONG = Rewriting("shorter"), Rewriting("longer")


def _rewrite_all(direction: str, config: Config, job: Job) -> None:
    shorter = direction == "shorter"
    template = load_prompt(config.prompt or ("shorten" if shorter else "lengthen"))
    ratio = config.ratio or (0.8 if shorter else 1.25)

    def fits(row: Row) -> bool:
        thought = thought_of(row) if has_chain(row) else None
        if thought is None or row.get("correct") is not True:
            return False
        return config.at_least <= len(thought) and (config.at_most is None or len(thought) <= config.at_most)

    with Verifier(config.grading) as verifier:
        rewrite = Rewriter(job, config.teacher, verifier, config.sampling, config.attempts)

        async def rewritten(row: Row) -> list[Out]:
            if not fits(row):
                return [row]
            before = len(thought_of(row))

            def accept(made: Row) -> str | None:
                share = len(thought_of(made)) / before
                if share <= ratio if shorter else share >= ratio:
                    return None
                return f"not {direction} enough"

            made = await rewrite(row, template, f"{row['id']}~{direction}", accept=accept)
            keep = config.keep_original or isinstance(made, Rejection)
            return [row, made] if keep else [made]

        async def transform(group: list[Row]) -> list[Out]:
            return [out for outs in await together(map(rewritten, group)) for out in outs]

        job.map_async(transform, [config.teacher])
