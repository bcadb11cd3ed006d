"""The reward of a sample: a weighted sum of terms, each graded, counted and logged on its own.

    r = Σ_t w_t · s_t,   where a style term counts for correct samples only, by default

Otherwise a policy would earn by style what it loses by being wrong. A term that could not be graded adds nothing.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np
import pydantic
from jaxtyping import Bool, Float

from dqjax.config import ConfigError, Section
from dqjax.rewards.correct import RIGHT, CorrectConfig, Correctness
from dqjax.rewards.format import FormatGrader
from dqjax.rewards.length import LengthGrader, OverlongConfig, OverlongGrader
from dqjax.rewards.model import ModelConfig, ModelGrader, Score
from dqjax.rewards.types import Completion, Grade, Grader, could_not
from dqjax.rewards.verbosity import DifficultyGrader, OncePerBatch, StyleConfig, StyleScorer, VerbosityGrader

log = logging.getLogger(__name__)


class TermConfig(Section):
    """One term of the sum.

    weight: its factor; 0 logs it and adds nothing. null where the term is not wanted at all.
    correct_only: it counts for correct samples only.
    """

    weight: float
    correct_only: bool = False


class StyleTermConfig(TermConfig):
    """A term about style: for correct samples only, unless `correct_only: false`."""

    correct_only: bool = True


class MixConfig(Section):
    """The `reward:` section: terms, and the settings of their graders.

    correct: right or wrong, by answer, task or tests. format: a well-formed think block. overlong: DAPO's punishment near
    the token limit (for all samples, as in the paper). length: shorter than the rest of the group. verbosity, difficulty:
    nearness of RV and CD to their targets. model: a reward model's score.
    """

    correct: TermConfig | None = TermConfig(weight=1.0)
    format: TermConfig | None = None
    overlong: TermConfig | None = None
    length: StyleTermConfig | None = None
    verbosity: StyleTermConfig | None = None
    difficulty: StyleTermConfig | None = None
    model: TermConfig | None = None
    grading: CorrectConfig = CorrectConfig()
    overlong_punishment: OverlongConfig | None = None
    style: StyleConfig = StyleConfig()
    reward_model: ModelConfig = ModelConfig()

    @pydantic.model_validator(mode="after")
    def _complete(self):
        if not self.terms:
            raise ValueError("no term is left: set at least one, such as correct: {weight: 1}")
        if (self.overlong is None) != (self.overlong_punishment is None):
            raise ValueError("overlong needs overlong_punishment: {limit, buffer}, and the other way round")
        if self.correct is None and (needy := [name for name, term in self.terms.items() if term.correct_only]):
            raise ValueError(
                f"{needy[0]}: counts for correct samples only, but correct is not graded; give it a weight of 0"
            )
        return self

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The terms that are wanted, by name, in the order of `TERMS`."""
        return {name: term for name in TERMS if (term := getattr(self, name)) is not None}


@dataclasses.dataclass(frozen=True)
class Sources:
    """What graders need and only a command can make.

    Attributes:
      style: an RV/CD scorer. score: a reward model.
      share: makes of a slow grader one that shares its work out over the processes of the job.
    """

    style: StyleScorer | None = None
    score: Score | None = None
    share: Callable[[Grader], Grader] = lambda grader: grader


TERMS: dict[str, Callable[[MixConfig, Sources], Grader]] = {
    "correct": lambda config, sources: sources.share(Correctness(config.grading)),
    "format": lambda config, sources: FormatGrader(),
    "overlong": lambda config, sources: OverlongGrader(config.overlong_punishment),
    "length": lambda config, sources: LengthGrader(),
    "verbosity": lambda config, sources: VerbosityGrader(
        config.style, _needed(sources.style, "verbosity", "an RV/CD scorer")
    ),
    "difficulty": lambda config, sources: DifficultyGrader(
        config.style, _needed(sources.style, "difficulty", "an RV/CD scorer")
    ),
    "model": lambda config, sources: ModelGrader(
        config.reward_model, _needed(sources.score, "model", "a reward model")
    ),
}


@dataclasses.dataclass(frozen=True)
class Rewards:
    """The rewards of a batch of N completions.

    Attributes:
      total: r, what the policy is trained on.
      terms: s_t of each term, unweighted; 0 where it failed.
      counted: where each term entered the sum.
      failed: where each term could not be graded.
      correct: the term `correct` reached 0.99; all False where it is not graded.
      grades: everything, for sample tables.
    """

    total: Float[np.ndarray, "N"]
    terms: dict[str, Float[np.ndarray, "N"]]
    counted: dict[str, Bool[np.ndarray, "N"]]
    failed: dict[str, Bool[np.ndarray, "N"]]
    correct: Bool[np.ndarray, "N"]
    grades: dict[str, list[Grade]]

    def sums(self) -> dict[str, tuple[float, float]]:
        """(sum, count) for the log, as `types.Mean` takes them.

        `reward`; `reward/TERM` over the samples that it could grade; `reward_counted/TERM` and `reward_failed/TERM`, shares.
        """
        n = float(len(self.total))
        out = {"reward": (float(self.total.sum()), n)}
        for name, scores in self.terms.items():
            graded = ~self.failed[name]
            out[f"reward/{name}"] = (float(scores[graded].sum()), float(graded.sum()))
            out[f"reward_counted/{name}"] = (float(self.counted[name].sum()), n)
            out[f"reward_failed/{name}"] = (float(self.failed[name].sum()), n)
        return out


class Mix:
    """Grades completions by every term of a config.

    A grader that raises marks all its samples as failed, is logged, and stops nothing. Only what would fail every time goes
    through: `ConfigError` (bad input, a missing package) and `NotImplementedError` (this machine cannot).

    Raises:
      ValueError: a term whose model is not among the sources.
    """

    def __init__(self, config: MixConfig, sources: Sources = Sources()):
        self._terms = config.terms
        if sources.style is not None:
            sources = dataclasses.replace(sources, style=OncePerBatch(sources.style))
        self._graders = {name: TERMS[name](config, sources) for name in self._terms}

    def __call__(self, completions: Sequence[Completion]) -> Rewards:
        n = len(completions)
        grades = {name: self._grade(name, completions) for name in self._terms}
        failed = {name: np.array([g.failed is not None for g in mine], bool) for name, mine in grades.items()}
        scores = {
            name: np.array([0.0 if g.failed is not None else g.score for g in mine], np.float64)
            for name, mine in grades.items()
        }
        correct = scores["correct"] >= RIGHT if "correct" in scores else np.zeros(n, bool)
        counted = {name: ~failed[name] & (correct | (not term.correct_only)) for name, term in self._terms.items()}
        total = np.zeros(n)
        for name, term in self._terms.items():
            total += term.weight * np.where(counted[name], scores[name], 0.0)
        return Rewards(total, scores, counted, failed, correct, grades)

    def close(self) -> None:
        """Ends the graders' processes."""
        for grader in self._graders.values():
            if hasattr(grader, "close"):
                grader.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _grade(self, name: str, completions: Sequence[Completion]) -> list[Grade]:
        try:
            grades = self._graders[name](completions)
            if len(grades) != len(completions):
                raise ValueError(f"{len(grades)} grades for {len(completions)} completions")
        except (ConfigError, NotImplementedError):
            raise
        except Exception as e:
            log.warning("reward %s could not grade %d samples: %s", name, len(completions), e, exc_info=True)
            return [could_not(f"{type(e).__name__}: {e}")] * len(completions)
        return grades


def _needed(source, term: str, what: str):
    if source is None:
        raise ValueError(f"reward.{term} needs {what}, and none is given")
    return source
