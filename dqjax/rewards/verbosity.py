"""Rewards for the style of a chain: the distance of its Reasoning Verbosity and Cognitive Difficulty from a target.

RV and CD are judge labels from 0 to 9 (OmniThought, https://arxiv.org/abs/2505.10937). The source paper names GRPO rewards
made from them; their form here is our own: 1 − |RV − RV*| / 9, and the same for CD.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import pydantic

from dqjax.config import Section
from dqjax.rewards.types import Completion, Grade, could_not

SCALE = 9.0


class Labels(NamedTuple):
    """RV and CD of a chain, 0 to 9, also fractions; None where a judge gave no usable answer (never 0)."""

    verbosity: float | None
    difficulty: float | None


class StyleScorer(Protocol):
    """Labels for completions: an RV/CD scorer model, or a judge."""

    def __call__(self, completions: Sequence[Completion]) -> Sequence[Labels]: ...


def stored_labels(completions: Sequence[Completion]) -> list[Labels]:
    """The labels that the rows themselves carry, under OmniThought's names: a scorer for completions out of a file.

    `data.records` reads the column Cognitive_Difficulty as a record's difficulty; of a row with a stored RV it is taken
    from there.
    """
    return [_stored(c) for c in completions]


def _stored(completion: Completion) -> Labels:
    extra = completion.problem.extra
    if "Reasoning_Verbosity" not in extra and "Cognitive_Difficulty" not in extra:
        return Labels(None, None)
    difficulty = extra.get("Cognitive_Difficulty", completion.problem.difficulty)
    return Labels(_label(extra.get("Reasoning_Verbosity")), _label(difficulty))


def _label(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= SCALE:
        return None
    return float(value)


class StyleConfig(Section):
    """Who labels chains, and the targets.

    scorer: a run folder of `objective: scorer`, or a folder exported from one.
    verbosity: RV*, one number for all problems; null lets it rise with the problem's difficulty d (0 to 9), between
      `verbosity_at_0` and `verbosity_at_9`: short chains for easy problems, long ones for hard ones.
    difficulty: CD*, what the student can follow.
    """

    scorer: str | None = None
    verbosity: float | None = pydantic.Field(None, ge=0, le=9)
    verbosity_at_0: float = pydantic.Field(1.0, ge=0, le=9)
    verbosity_at_9: float = pydantic.Field(8.0, ge=0, le=9)
    difficulty: float = pydantic.Field(4.0, ge=0, le=9)

    def verbosity_for(self, difficulty: float | None) -> float | None:
        """RV* of a problem; None where it depends on a difficulty that is not known."""
        if self.verbosity is not None:
            return self.verbosity
        if difficulty is None:
            return None
        share = min(max(difficulty / SCALE, 0.0), 1.0)
        return self.verbosity_at_0 + share * (self.verbosity_at_9 - self.verbosity_at_0)


class VerbosityGrader:
    """1 − |RV − RV*| / 9."""

    def __init__(self, config: StyleConfig, scorer: StyleScorer):
        self._config, self._scorer = config, scorer

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        labels = _checked(self._scorer(completions), completions)
        return [self._grade(c, label.verbosity) for c, label in zip(completions, labels)]

    def _grade(self, completion: Completion, verbosity: float | None) -> Grade:
        difficulty = completion.problem.difficulty
        target = self._config.verbosity_for(difficulty)
        if target is None:
            return could_not("the target depends on the problem's difficulty, which is not known")
        return _closeness(verbosity, target, "RV")


class DifficultyGrader:
    """1 − |CD − CD*| / 9."""

    def __init__(self, config: StyleConfig, scorer: StyleScorer):
        self._config, self._scorer = config, scorer

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        labels = _checked(self._scorer(completions), completions)
        return [_closeness(label.difficulty, self._config.difficulty, "CD") for label in labels]


class OncePerBatch:
    """A scorer that is asked once for a batch, however many graders want its labels."""

    def __init__(self, scorer: StyleScorer):
        self._scorer = scorer
        self._batch: Sequence[Completion] | None = None
        self._labels: Sequence[Labels] = ()

    def __call__(self, completions: Sequence[Completion]) -> Sequence[Labels]:
        if self._batch is not completions:
            self._labels = _checked(self._scorer(completions), completions)
            self._batch = completions
        return self._labels


def _checked(labels: Sequence[Labels], completions: Sequence[Completion]) -> Sequence[Labels]:
    if len(labels) != len(completions):
        raise ValueError(f"the scorer gave {len(labels)} labels for {len(completions)} completions")
    return labels


def _closeness(value: float | None, target: float, name: str) -> Grade:
    if value is None or not math.isfinite(value):
        return could_not(f"no {name} label")
    return Grade(1.0 - abs(value - target) / SCALE, detail=f"{name} {value:g}, target {target:g}")
