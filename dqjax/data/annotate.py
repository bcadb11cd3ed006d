"""RV, CD and logical correctness of chains: one judge call each, several votes where asked for.

Reasoning Verbosity and Cognitive Difficulty are integers from 0 to 9, correctness is 0 or 1 (OmniThought,
https://arxiv.org/abs/2505.10937). A reply that states no such integer is missing, never 0; a label is the median of the
votes that state one, provided that more than half do.

    label = median(votes)        spread = max(votes) − min(votes)
"""

import statistics
from typing import Literal

import pydantic

from dqjax.config import Section
from dqjax.data.chain_rows import (
    DIFFICULTY,
    VERBOSITY,
    Row,
    chain_text,
    completion_of,
    has_chain,
    label_of,
    note,
    question_of,
)
from dqjax.data.length_labels import LengthRule, LengthRuleConfig
from dqjax.data.models import ScorerConfig
from dqjax.data.prompt import load_prompt
from dqjax.data.replies import answer_of, read_integer
from dqjax.data.stage import Job, Out, rejection, together
from dqjax.data.teacher import CallFailed, Reply, Request, SamplingConfig
from dqjax.rewards.verbosity import StyleScorer

HELP = "label chains with Reasoning Verbosity, Cognitive Difficulty and logical correctness"

LABELS = {"verbosity": (VERBOSITY, 9), "difficulty": (DIFFICULTY, 9), "correctness": ("Logical_Correctness", 1)}


class Config(Section):
    """annotate. A judge, a scorer or a rule labels.

    judge: a teacher's name. votes: calls a label. sampling: its sampling; several votes need a temperature.
    scorer: a trained RV/CD scorer, in place of a judge.
    length_rule: labels by length alone, without any model: a stand-in where there is neither.
    labels: which to give; scorer and rule give the first two.
    overwrite: label chains again that carry the label already.
    """

    judge: str | None = None
    votes: int = pydantic.Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=4096)
    scorer: ScorerConfig | None = None
    length_rule: LengthRuleConfig | None = None
    labels: tuple[Literal["verbosity", "difficulty", "correctness"], ...] = ("verbosity", "difficulty", "correctness")
    verbosity_prompt: str = "annotate_verbosity"
    difficulty_prompt: str = "annotate_difficulty"
    correctness_prompt: str = "annotate_correctness"
    overwrite: bool = False

    @pydantic.model_validator(mode="after")
    def _one_source(self):
        if [self.judge, self.scorer, self.length_rule].count(None) != 2:
            raise ValueError("expected one of judge, scorer, length_rule")
        if self.votes > 1 and self.sampling.temperature == 0:
            raise ValueError("votes: at temperature 0 all votes are one; set sampling.temperature")
        return self


def run(config: Config, job: Job) -> None:
    """Adds the labels, and `NAME_spread` where there is more than one vote."""
    if config.judge is None:
        if config.scorer is not None:
            scorer, by = job.staff.scorer(config.scorer), config.scorer.checkpoint
        else:
            scorer, by = LengthRule(config.length_rule), "length rule"
        job.map_batches(lambda rows: _label_by_scorer(rows, scorer, config, job, by))
        return
    templates = {name: load_prompt(getattr(config, f"{name}_prompt")) for name in config.labels}

    async def vote(row: Row, name: str, k: int) -> tuple[int | None, Request, Reply | None]:
        messages = templates[name](question=question_of(row), chain=chain_text(row))
        request = Request(messages, config.sampling, k, templates[name].label)
        try:
            reply = await job.teacher(config.judge).ask(request)
        except CallFailed:
            return None, request, None
        return read_integer(answer_of(reply), 0, LABELS[name][1]), request, reply

    async def labelled(row: Row) -> Out:
        if not has_chain(row):
            return rejection(row, "no chain to label")
        wanted = _wanted(row, config)
        votes = await together(vote(row, name, k) for name in wanted for k in range(config.votes))
        for i, name in enumerate(wanted):
            row = _with_votes(row, name, votes[i * config.votes : (i + 1) * config.votes], job)
        return _with_difficulty(row)

    async def transform(group: list[Row]) -> list[Out]:
        return await together(map(labelled, group))

    job.map_async(transform, [config.judge])


def _label_by_scorer(rows: list[Row], scorer: StyleScorer, config: Config, job: Job, by: str) -> list[Out]:
    """RV and CD by anything that scores completions."""
    ready = [row for row in rows if has_chain(row)]
    labels = iter(scorer([completion_of(row) for row in ready]))
    outs: list[Out] = []
    for row in rows:
        if not has_chain(row):
            outs.append(rejection(row, "no chain to label"))
            continue
        found = next(labels)._asdict()
        for name in _wanted(row, config):
            if name not in found:
                continue
            field, value = LABELS[name][0], found[name]
            job.counts[f"{field} {'missing' if value is None else 'given'}"] += 1
            row = {key: old for key, old in row.items() if key != field}
            if value is not None:
                row = note(row | {field: round(value, 2)}, field, job.name, by)
        outs.append(_with_difficulty(row))
    return outs


def _wanted(row: Row, config: Config) -> list[str]:
    """The labels to give to a row."""
    return [name for name in config.labels if config.overwrite or row.get(LABELS[name][0]) is None]


def _with_votes(row: Row, name: str, votes: list[tuple[int | None, Request, Reply | None]], job: Job) -> Row:
    field = LABELS[name][0]
    given = [value for value, _, _ in votes if value is not None]
    job.counts[f"{field} votes"] += len(votes)
    job.counts[f"{field} votes missing"] += len(votes) - len(given)
    if 2 * len(given) <= len(votes):
        job.counts[f"{field} missing"] += 1
        return {key: value for key, value in row.items() if key not in (field, f"{field}_spread")}
    job.counts[f"{field} given"] += 1
    row = row | {field: float(statistics.median(given))}
    if len(votes) > 1:
        row[f"{field}_spread"] = float(max(given) - min(given))
    _, request, reply = next(v for v in votes if v[0] is not None)
    return note(row, field, job.name, reply.model, request=request, reply=reply)


def _with_difficulty(row: Row) -> Row:
    """CD is also the difficulty that a curriculum sorts by, as in OmniThought's rows."""
    label = label_of(row, DIFFICULTY)
    return row if label is None else row | {"difficulty": label}
