"""A learned reward: whatever score function the caller has made from a reward model."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from dqjax.config import Section
from dqjax.rewards.types import Completion, Grade, could_not

Score = Callable[[Sequence[Completion]], Sequence[float]]
"""Reward-model scores of completions, one each: unbounded logits of the Bradley-Terry head."""


class ModelConfig(Section):
    """The reward model, and how its scores become rewards.

    checkpoint: a run folder of `objective: reward`, or a folder exported from one.
    squash: `sigmoid` maps a score into (0, 1), the probability of winning against a score of 0, so that no outlier
      outweighs correctness; `none` takes it as it is.
    """

    checkpoint: str | None = None
    squash: Literal["sigmoid", "none"] = "sigmoid"


class ModelGrader:
    """The reward model's score of a completion.

    A score that is not finite is a failure. An exception of the score function reaches the caller (`mix` counts it).

    Raises (when called):
      ValueError: another number of scores than of completions.
    """

    def __init__(self, config: ModelConfig, score: Score):
        self._config, self._score = config, score

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        scores = self._score(completions)
        if len(scores) != len(completions):
            raise ValueError(f"the reward model gave {len(scores)} scores for {len(completions)} completions")
        return [self._grade(float(score)) for score in scores]

    def _grade(self, score: float) -> Grade:
        if not math.isfinite(score):
            return could_not(f"the reward model's score is {score}")
        if self._config.squash == "none":
            return Grade(score)
        # exp of a negative number alone: no overflow on either side
        e = math.exp(-abs(score))
        return Grade(1 / (1 + e) if score >= 0 else e / (1 + e), detail=f"{score:.4g}")
