"""The scorers of reasoning-gym's tasks: the function that grading workers run."""

from collections.abc import Mapping
from typing import Any

from reasoning_gym import get_score_answer_fn


def score(request: Mapping[str, Any]) -> float:
    """The verdict of a task's own scorer, 0 to 1.

    Args:
      request: `task`, `prediction`, and the problem as an `entry` of question, answer and metadata.

    Raises:
      ValueError: reasoning-gym has no such task.
    """
    return float(get_score_answer_fn(request["task"])(answer=request["prediction"], entry=request["entry"]))
