"""RV and CD by rule, for files that no judge has read.

A stand-in [D]: verbosity is the position of the chain's length on a logarithmic scale, difficulty that of the number of
its steps (lines). It orders chains by length and knows nothing of their content: labels of a judge or a trained scorer
are better wherever they can be had.

    RV = clip(9 · log(n / shortest) / log(longest / shortest), 0, 9)
"""

import math
from collections.abc import Sequence

import pydantic

from dqjax.config import Section
from dqjax.rewards.types import Completion
from dqjax.rewards.verbosity import SCALE, Labels


class LengthRuleConfig(Section):
    """The scales: the values that are 0 and 9.

    shortest, longest: words of a chain, for RV. few, many: lines of a chain that are not empty, for CD.
    """

    shortest: int = pydantic.Field(20, ge=1)
    longest: int = pydantic.Field(8000, ge=2)
    few: int = pydantic.Field(1, ge=1)
    many: int = pydantic.Field(400, ge=2)

    @pydantic.model_validator(mode="after")
    def _in_order(self):
        if self.shortest >= self.longest or self.few >= self.many:
            raise ValueError("expected shortest < longest and few < many")
        return self


class LengthRule:
    """A `StyleScorer` by the rule above; an answer without a chain has no labels."""

    def __init__(self, config: LengthRuleConfig):
        self._config = config

    def __call__(self, completions: Sequence[Completion]) -> list[Labels]:
        return [self._labels(c.response.thinking) for c in completions]

    def _labels(self, chain: str | None) -> Labels:
        if chain is None or not chain.strip():
            return Labels(None, None)
        words, lines = len(chain.split()), sum(bool(line.strip()) for line in chain.splitlines())
        c = self._config
        return Labels(_position(words, c.shortest, c.longest), _position(lines, c.few, c.many))


def _position(value: int, low: int, high: int) -> float:
    share = math.log(value / low) / math.log(high / low)
    return SCALE * min(max(share, 0.0), 1.0)
