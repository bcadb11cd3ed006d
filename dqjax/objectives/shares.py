"""Slow grading shared out over the processes of a job."""

import logging
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from dqjax.config import ConfigError
from dqjax.rewards.types import Completion, Grade, Grader, could_not

log = logging.getLogger(__name__)


class Shared:
    """A grader of which each process grades its share: all get all scores, in the same order.

    Sampled tokens are the same on every process, so each one could grade everything; with answers checked by sympy or by
    running programs that would cost as many cores as there are processes. Of samples that another process has graded the
    score is known, and whether there is one, not what the grader wrote beside it.

    Every process must ask for the same completions, at the same time.
    """

    def __init__(self, grader: Grader):
        self._grader = grader

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        count, me = jax.process_count(), jax.process_index()
        if count == 1:
            return self._grader(completions)
        mine = self._grade(completions[me::count])
        scores = np.full(-(-len(completions) // count), np.nan, np.float32)
        scores[: len(mine)] = [np.nan if grade.failed is not None else grade.score for grade in mine]
        gathered = multihost_utils.process_allgather(scores)  # [processes, share]
        grades = [_grade_of(float(gathered[i % count, i // count])) for i in range(len(completions))]
        grades[me::count] = mine
        return grades

    def close(self) -> None:
        """Ends the grader's processes."""
        self._grader.close()

    def _grade(self, completions: Sequence[Completion]) -> list[Grade]:
        """Grades; a grader that raises fails its share, lest the other processes wait for it forever."""
        try:
            return self._grader(completions)
        except (ConfigError, NotImplementedError):
            raise
        except Exception as e:
            log.warning("could not grade %d samples: %s", len(completions), e, exc_info=True)
            return [could_not(f"{type(e).__name__}: {e}")] * len(completions)


def _grade_of(score: float) -> Grade:
    return could_not("another process could not grade it") if np.isnan(score) else Grade(score)
