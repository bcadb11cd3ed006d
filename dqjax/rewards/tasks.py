"""reasoning-gym problems, scored by the scorers of their own tasks (https://github.com/open-thought/reasoning-gym).

The scorers give partial credit (0.01 or 0.05 for trying, on countdown even for no answer), so correct means a score of at
least 0.99. Some evaluate the answer as an expression, so they run in worker processes with a time limit.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from dqjax.config import ConfigError, Section
from dqjax.rewards import extract
from dqjax.rewards.types import Completion, Grade, could_not
from dqjax.rewards.workers import Workers

CORRECT = 0.99


class TasksConfig(Section):
    """How reasoning-gym problems are scored.

    partial: the scorer's own credit as the reward instead of right or wrong.
    workers, timeout: processes, and seconds an answer.
    """

    partial: bool = False
    workers: int = pydantic.Field(2, ge=1)
    timeout: float = pydantic.Field(10.0, gt=0)


class TaskGrader:
    """Score 1 where the task's scorer gives at least 0.99, else 0 (or the scorer's credit, with `partial`).

    A problem names its task in `extra["metadata"]["source_dataset"]`. The scorer gets the last box, else the last
    `<answer>` tag, else the whole answer behind the think block.

    Raises:
      ConfigError: reasoning-gym is not installed.
    """

    def __init__(self, config: TasksConfig = TasksConfig()):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError("reasoning-gym problems need an extra package: pip install 'dqjax[tasks]'")
        self._config = config
        self._workers = Workers("dqjax.rewards.task_scores:score", workers=config.workers, timeout=config.timeout)

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        grades: list[Grade | None] = []
        for c in completions:
            if task_of(c.problem) is None:
                grades.append(could_not("no reasoning-gym task: extra['metadata']['source_dataset'] is missing"))
            else:
                grades.append(None if c.response.closed else Grade(0.0, detail="the think block never closes"))
        open_ = [i for i, grade in enumerate(grades) if grade is None]
        requests = [_request(completions[i]) for i in open_]
        for i, request, reply in zip(open_, requests, self._workers.map(requests)):
            if reply.failed:
                grades[i] = could_not(f"scorer: {reply.failed}")
                continue
            score = reply.value if self._config.partial else float(reply.value >= CORRECT)
            grades[i] = Grade(score, request["prediction"])
        return grades

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()


def task_of(problem: Any) -> str | None:
    """The name of a problem's reasoning-gym task; None where it comes from elsewhere."""
    metadata = problem.extra.get("metadata")
    return metadata.get("source_dataset") if isinstance(metadata, Mapping) else None


def _request(completion: Completion) -> dict:
    problem, answer = completion.problem, completion.response.answer
    entry = {"question": problem.question, "answer": problem.answer, "metadata": dict(problem.extra["metadata"])}
    stated = extract.last_boxed(answer)
    if stated is None:
        stated = extract.last_tag(answer)
    return {"task": task_of(problem), "entry": entry, "prediction": answer.strip() if stated is None else stated}
