"""Rewards by length: a punishment near the token limit, and a preference for the shorter ones of a group."""

from collections.abc import Sequence

import pydantic

from dqjax.config import Section
from dqjax.rewards.types import Completion, Grade


class OverlongConfig(Section):
    """Where the punishment starts and ends, in sampled tokens.

    limit: the most that may be sampled, L_max. buffer: the part of it where the punishment grows, L_cache.
    """

    limit: int = pydantic.Field(ge=1)
    buffer: int = pydantic.Field(ge=1)

    @pydantic.model_validator(mode="after")
    def _buffer_within_limit(self):
        if self.buffer > self.limit:
            raise ValueError(f"buffer: {self.buffer} tokens are more than limit: {self.limit}")
        return self


class OverlongGrader:
    """DAPO's soft overlong punishment, between −1 and 0 (https://arxiv.org/abs/2503.14476, equation 13):

        0                                  |y| ≤ L_max − L_cache
        ((L_max − L_cache) − |y|) / L_cache    up to L_max
        −1                                 beyond

    A completion that was cut is beyond the limit, whatever its length: that is our addition.
    """

    def __init__(self, config: OverlongConfig):
        self._config = config

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        free = self._config.limit - self._config.buffer
        grow = lambda tokens: max(-1.0, min(0.0, (free - tokens) / self._config.buffer))  # noqa: E731
        return [Grade(-1.0 if c.truncated else grow(c.tokens)) for c in completions]


class LengthGrader:
    """Kimi k1.5's length reward, between −½ and ½ within the completions of one problem
    (https://arxiv.org/abs/2501.12599, section 2.3.3):

        λ = ½ − (tokens − shortest) / (longest − shortest)

    The paper gives wrong answers min(0, λ); here `mix` counts the term for right ones only, unless it is told otherwise.
    A group of equal lengths, or of one, gets 0. The batch must hold whole groups.
    """

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        groups: dict[str, list[int]] = {}
        for c in completions:
            groups.setdefault(c.problem.id, []).append(c.tokens)
        grades = []
        for c in completions:
            shortest, longest = min(groups[c.problem.id]), max(groups[c.problem.id])
            spread = longest - shortest
            grades.append(Grade(0.5 - (c.tokens - shortest) / spread if spread else 0.0))
        return grades
