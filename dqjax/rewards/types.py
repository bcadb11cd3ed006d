"""What every grader takes and gives: completions in, one grade each out.

A grader is a callable `grader(completions) -> [grade, ...]`, one grade a completion and in their order. It never raises
for what a model wrote: a completion that cannot be graded (a timeout, an exception, a missing label) gets a grade whose
`failed` says why, so that the caller can count it and go on. It raises only where its caller is wrong.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Problem(Protocol):
    """What graders read of a problem; `dqjax.data.records.Record` is one."""

    @property
    def id(self) -> str: ...

    @property
    def question(self) -> str: ...

    @property
    def answer(self) -> str | None:
        """The reference answer."""

    @property
    def difficulty(self) -> float | None: ...

    @property
    def extra(self) -> Mapping[str, Any]:
        """Other columns: `metadata` for reasoning-gym, `tests` for code, `choices`, stored labels."""


class Response(Protocol):
    """A completion taken apart; `dqjax.data.chat.Response` is one."""

    @property
    def thinking(self) -> str | None:
        """What the think block holds; None without one."""

    @property
    def answer(self) -> str:
        """What follows the think block: the only text in which an answer counts."""

    @property
    def closed(self) -> bool:
        """False where a think block was opened and never closed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    Attributes:
      problem: what was asked.
      text: all that was sampled, without the mark that ends the turn.
      response: the text taken apart by the chat format that also made the prompt.
      tokens: sampled tokens, thinking included.
      truncated: the sample was cut at the token limit.
      thinking: it was asked for in thinking mode.
      opened: the prompt already held the opening `<think>`.
    """

    problem: Problem
    text: str
    response: Response
    tokens: int
    truncated: bool = False
    thinking: bool = True
    opened: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Grade:
    """What a grader says of one completion.

    Attributes:
      score: the reward; 0 where `failed` is set.
      answer: the answer that was read out of the completion; None where there is none. Majority votes count these.
      detail: what else a reader should know (why there is no answer, the failing test).
      failed: why it could not grade; None where it could. A wrong answer is a grade, not a failure.
    """

    score: float
    answer: str | None = None
    detail: str = ""
    failed: str | None = None


class Grader(Protocol):
    """See the module's text."""

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]: ...


def could_not(reason: str) -> Grade:
    """The grade of a completion that could not be graded."""
    return Grade(0.0, failed=reason)
