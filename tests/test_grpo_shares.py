"""Grading shared out over processes: each grades its share, and all know all scores."""

import dataclasses

import numpy as np
import pytest

from dqjax.objectives import shares
from dqjax.rewards.types import Grade, could_not


@dataclasses.dataclass
class Grader:
    """Scores a number by itself; cannot grade multiples of 5, and raises on `bad`."""

    bad: int | None = None
    asked: list = dataclasses.field(default_factory=list)

    def __call__(self, completions):
        self.asked += completions
        if self.bad in completions:
            raise OSError("no space left")
        return [could_not("five") if c % 5 == 0 else Grade(float(c), detail="mine") for c in completions]

    def close(self):
        self.asked = None


def grade_together(monkeypatch, completions, graders):
    """What each of the processes gets; they meet in `process_allgather`, here one after the other."""
    sent, results = {}, []
    monkeypatch.setattr(shares.jax, "process_count", lambda: len(graders))
    for gathering in (False, True):
        for me, grader in enumerate(graders):
            monkeypatch.setattr(shares.jax, "process_index", lambda: me)  # noqa: B023

            def gather(scores):
                sent[me] = scores  # noqa: B023
                return np.stack([sent.get(p, scores) for p in range(len(graders))])

            monkeypatch.setattr(shares.multihost_utils, "process_allgather", gather)
            grades = shares.Shared(grader)(completions)
            results += [grades] if gathering else []
    return results


def scores(grades):
    return [None if g.failed is not None else g.score for g in grades]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("completions", [list(range(1, 9)), [1], []])
def test_all_processes_get_the_grades_of_one(monkeypatch, count, completions):
    graders = [Grader() for _ in range(count)]
    together = grade_together(monkeypatch, completions, graders)
    alone = scores(Grader()(completions))
    assert [scores(grades) for grades in together] == [alone] * count
    assert [g.asked for g in graders] == [completions[me::count] * 2 for me in range(count)]  # asked twice, see above


def test_a_grader_that_raises_fails_its_share_alone(monkeypatch):
    first, second = grade_together(monkeypatch, [1, 2, 3, 4], [Grader(), Grader(bad=4)])
    assert scores(first) == scores(second) == [1.0, None, 3.0, None]
    assert second[1].failed == "OSError: no space left" and "another process" in first[1].failed


def test_closing_closes_the_grader():
    grader = Grader()
    shares.Shared(grader).close()
    assert grader.asked is None
