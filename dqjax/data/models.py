"""Models of our own that stages use and do not make: whoever runs the stages knows how, `python -m dqjax.data` does."""

from typing import Literal, Protocol

import pydantic

from dqjax.config import Section
from dqjax.data.teacher import Teacher, TeacherConfig
from dqjax.rewards.verbosity import StyleScorer


class ScorerConfig(Section):
    """A trained RV/CD scorer.

    checkpoint: a run folder of `objective: scorer`, or a folder exported from one.
    row_length: tokens of a packed row, the longest chain that gets labels. rows: scored together. dtype: of the
      arithmetic.
    """

    checkpoint: str
    row_length: int = pydantic.Field(16384, ge=2)
    rows: int = pydantic.Field(8, ge=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class Models(Protocol):
    """Makes them; raises ConfigError for a folder that holds something else."""

    def teacher(self, config: TeacherConfig) -> Teacher:
        """Of a config with `local`."""

    def scorer(self, config: ScorerConfig) -> StyleScorer: ...
