"""Correctness, whatever the problem: each goes to the grader that its own columns name.

Training rewards and evaluation share this file, so that a benchmark measures what a policy was rewarded for.
"""

from collections.abc import Callable, Iterable, Sequence

from dqjax.config import ConfigError, Section
from dqjax.rewards.answer import AnswerConfig, AnswerGrader
from dqjax.rewards.code import CodeConfig, CodeGrader
from dqjax.rewards.tasks import TaskGrader, TasksConfig, task_of
from dqjax.rewards.types import Completion, Grade, Grader, Problem, could_not

RIGHT = 0.99  # a score of at least so much counts as correct


class CorrectConfig(Section):
    """The graders of correctness, one section each."""

    answer: AnswerConfig = AnswerConfig()
    tasks: TasksConfig = TasksConfig()
    code: CodeConfig = CodeConfig()


GRADERS: dict[str, Callable[[CorrectConfig], Grader]] = {
    "answer": lambda config: AnswerGrader(config.answer),
    "tasks": lambda config: TaskGrader(config.tasks),
    "code": lambda config: CodeGrader(config.code),
}


def grader_of(problem: Problem) -> str:
    """The key of `GRADERS` for a problem: its `grader` column, else `code` for one with tests, `tasks` for a
    reasoning-gym problem, `answer` for any other."""
    if named := problem.extra.get("grader"):
        return named
    return "code" if "tests" in problem.extra else "tasks" if task_of(problem) else "answer"


class Correctness:
    """Score 1 for a correct completion, 0 for any other. Graders are made when a problem first needs them."""

    def __init__(self, config: CorrectConfig = CorrectConfig()):
        self._config = config
        self._graders: dict[str, Grader] = {}

    def prepare(self, problems: Iterable[Problem]) -> None:
        """Makes the graders that problems need, so that what is missing is said before anything is sampled.

        Raises:
          ConfigError: an unknown grader, or reasoning-gym is not installed.
          NotImplementedError: programs cannot be confined on this machine.
        """
        for problem in problems:
            name = grader_of(problem)
            if name not in GRADERS:
                raise ConfigError(f"problem {problem.id}: unknown grader {name!r}; one of {', '.join(GRADERS)}")
            if name not in self._graders:
                self._graders[name] = GRADERS[name](self._config)

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        self.prepare(c.problem for c in completions)
        grades: list[Grade] = [could_not("not graded")] * len(completions)
        names = [grader_of(c.problem) for c in completions]
        for name in dict.fromkeys(names):
            mine = [i for i, other in enumerate(names) if other == name]
            for i, grade in zip(mine, self._graders[name]([completions[i] for i in mine]), strict=True):
                grades[i] = grade
        return grades

    def close(self) -> None:
        """Ends the graders' processes."""
        for grader in self._graders.values():
            grader.close()
        self._graders.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
