"""Preference pairs for reward models and for CogPO.

    quality       one teacher under a high- and a low-quality system prompt [E]
    correctness   verified right against verified wrong, of one problem
    style         the chain nearest to the RV/CD target against one farther off [D]
    cogpo         three gaps, each with its β [S; the values are D]:
                    small   a refined chain against the unsuitable, correct one it was made from      β = 0.1
                    medium  a correct but unsuitable chain against an incorrect one                   β = 0.2
                    large   a suitable chain against an incorrect one                                 β = 0.5

A row: `prompt`, `chosen`, `rejected` (lists of messages), `kind`, and for CogPO `gap` and `beta`. Its id is made of the
two chains' ids.
"""

import asyncio
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import pydantic

from dqjax.config import Section
from dqjax.data.chain_rows import Row, has_chain, note, prompt_turns, solution_of, thought_of, with_answer
from dqjax.data.prompt import load_prompt
from dqjax.data.replies import Unusable, split_reply
from dqjax.data.select import DrawConfig, log_weight
from dqjax.data.stage import Job, Out, failure, rejection
from dqjax.data.teacher import CallFailed, Request, SamplingConfig

HELP = "make preference pairs: quality prompts, right against wrong, RV/CD distance, CogPO's three gaps"


class Config(Section):
    """pairs.

    kind: see the module. per_problem: pairs of a problem at most (of each gap, for cogpo).
    min_distance: of `style`: how much farther the rejected chain lies from the target, in RV/CD units.
    target: of `style`; per_problem and seed of it have no effect.
    small, medium, large: β of CogPO's gaps.
    teacher, sampling, high_prompt, low_prompt: of `quality`.
    """

    kind: Literal["quality", "correctness", "style", "cogpo"]
    per_problem: int = pydantic.Field(1, ge=1)
    min_distance: float = pydantic.Field(2.0, gt=0)
    target: DrawConfig = DrawConfig()
    small: float = pydantic.Field(0.1, gt=0)
    medium: float = pydantic.Field(0.2, gt=0)
    large: float = pydantic.Field(0.5, gt=0)
    teacher: str | None = None
    sampling: SamplingConfig = SamplingConfig()
    high_prompt: str = "quality_high"
    low_prompt: str = "quality_low"

    @pydantic.model_validator(mode="after")
    def _teacher_where_needed(self):
        if (self.kind == "quality") != (self.teacher is not None):
            raise ValueError("teacher: name one for kind quality, and for no other kind")
        return self


def run(config: Config, job: Job) -> None:
    """Writes the pairs; a problem that gives none is rejected, so that the report counts it."""
    if config.kind == "quality":
        _run_quality(config, job)
        return
    make = {"correctness": _right_and_wrong, "style": _near_and_far, "cogpo": _gaps}[config.kind]

    def transform(group: Sequence[Row]) -> list[Out]:
        chains = [row for row in group if has_chain(row)]
        made = list(make(chains, config))
        for pair in made:
            job.counts[f"pairs {pair.get('gap', config.kind)}"] += 1
        return made or [rejection(group[0], f"no {config.kind} pair")]

    job.map(transform)


def pair_of(chosen: Row, rejected: Row, kind: str, **more) -> Row | None:
    """The preference row; None where both say the same, or one has a chain and the other none.

    A chat template would put the latter two behind different prompts, so that no loss can compare them.
    """
    if _said(chosen) == _said(rejected) or (thought_of(chosen) is None) != (thought_of(rejected) is None):
        return None
    turns = chosen["messages"][:-1]
    row = {"id": f"{chosen['id']}>{rejected['id']}", "problem_id": chosen["problem_id"], "prompt": turns}
    row |= {"chosen": chosen["messages"][-1:], "rejected": rejected["messages"][-1:], "kind": kind, **more}
    row |= {key: chosen[key] for key in ("answer", "source", "difficulty") if key in chosen}
    older = [
        {**entry, "field": f"{side}.{entry['field']}"}
        for side, chain in (("chosen", chosen), ("rejected", rejected))
        for entry in chain.get("provenance") or []
    ]
    return row | {"provenance": older}


def _said(row: Row) -> tuple[str | None, str]:
    return thought_of(row), solution_of(row)


def _right_and_wrong(chains: Sequence[Row], config: Config) -> Iterator[Row]:
    right = [row for row in chains if row.get("correct") is True]
    wrong = [row for row in chains if row.get("correct") is False]
    yield from itertools.islice(_crossed(right, wrong, "correctness"), config.per_problem)


def _near_and_far(chains: Sequence[Row], config: Config) -> Iterator[Row]:
    """Distance: d = sqrt((RV − RV*)² + λ (CD − CD*)²), over chains that are not known to be wrong."""
    distance = {}
    for i, row in enumerate(chains):
        weight = log_weight(row, config.target) if row.get("correct") is not False else None
        if weight is not None:
            distance[i] = math.sqrt(-2 * weight) * config.target.temperature
    order = sorted(distance, key=distance.__getitem__)
    if not order:
        return
    nearest, made = order[0], 0
    for far in reversed(order[1:]):
        gap = distance[far] - distance[nearest]
        if gap < config.min_distance or made == config.per_problem:
            return
        if pair := pair_of(chains[nearest], chains[far], "style", distance=round(gap, 3)):
            made += 1
            yield pair


def _gaps(chains: Sequence[Row], config: Config) -> Iterator[Row]:
    by_id = {row["id"]: row for row in chains}
    suitable = [row for row in chains if row.get("correct") is True and row.get("suitable") is True]
    unsuitable = [row for row in chains if row.get("correct") is True and row.get("suitable") is False]
    wrong = [row for row in chains if row.get("correct") is False]
    refined = ((row, by_id[row["refined_from"]]) for row in suitable if row.get("refined_from") in by_id)
    small = (pair_of(good, bad, "cogpo", gap="small", beta=config.small) for good, bad in refined)
    yield from itertools.islice(filter(None, small), config.per_problem)
    medium = _crossed(unsuitable, wrong, "cogpo", gap="medium", beta=config.medium)
    yield from itertools.islice(medium, config.per_problem)
    large = _crossed(suitable, wrong, "cogpo", gap="large", beta=config.large)
    yield from itertools.islice(large, config.per_problem)


def _crossed(good: Sequence[Row], bad: Sequence[Row], kind: str, **more) -> Iterator[Row]:
    """Pairs of all combinations, along the diagonals: first each chain once, then combinations already used in part."""
    for shift in range(len(bad)):
        for i, chosen in enumerate(good):
            if i < len(bad) and (pair := pair_of(chosen, bad[(i + shift) % len(bad)], kind, **more)):
                yield pair
    for i, chosen in enumerate(good[len(bad) :]):
        for rejected in bad[i % max(len(bad), 1) :]:
            if pair := pair_of(chosen, rejected, kind, **more):
                yield pair


def _run_quality(config: Config, job: Job) -> None:
    sides = {"high": load_prompt(config.high_prompt), "low": load_prompt(config.low_prompt)}

    async def answer(row: Row, side: str, k: int) -> Row:
        question = next(m.content for m in reversed(prompt_turns(row)) if m.role == "user")
        request = Request(sides[side](question=question), config.sampling, k, sides[side].label)
        reply = await job.teacher(config.teacher).ask(request)
        made = with_answer(row, *split_reply(reply)) | {"id": f"{row['problem_id']}#{config.teacher}/{side}{k}"}
        return note(made, "messages", job.name, reply.model, request=request, reply=reply)

    async def pair(row: Row, k: int) -> Out:
        try:
            chosen, rejected = await asyncio.gather(answer(row, "high", k), answer(row, "low", k))
        except CallFailed as e:
            return failure(row, e)
        except Unusable as e:
            return rejection(row, f"unusable answer: {e}")
        alike = "the same answer" if _said(chosen) == _said(rejected) else "one answer with a chain and one without"
        return pair_of(chosen, rejected, "quality") or rejection(row, f"the two prompts gave {alike}")

    async def transform(group: list[Row]) -> list[Out]:
        return await asyncio.gather(*(pair(group[0], k) for k in range(config.per_problem)))

    job.map_async(transform, [config.teacher])
