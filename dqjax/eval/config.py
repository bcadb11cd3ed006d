"""The settings of an evaluation, as `configs/eval/*.yaml` hold them and options of the command change them."""

import datetime
import hashlib
import json
from typing import Literal

import pydantic

from dqjax.config import Section
from dqjax.data.config import SourceConfig
from dqjax.rewards.correct import CorrectConfig


class EvalConfig(Section):
    """What is asked, how it is sampled, how it is graded.

    benchmark: a name from `eval.benchmarks`, or a jsonl or parquet file of question and answer.
    file: the file of a named benchmark; the README says where each comes from.
    tasks: the sources of the benchmark `tasks` (reasoning-gym).
    limit: only the first so many problems.
    instruction: text added to each question; null takes the benchmark's own, "" adds nothing.
    system: a system prompt.
    samples: n samples a problem. k: the pass@k that are reported, each at most `samples`.
    thinking: `on`, `off`, or `both`, one row of the report each.
    temperature, top_p, top_k, min_p: see `rollout.sampling`. The defaults are those of the source paper's thinking models.
    max_new_tokens: the limit of a sample; what runs into it is truncated.
    thinking_budget: new tokens after which thinking that has not ended is ended by force, so that an answer follows; null:
      never. For a checkpoint only.
    seed: of the samples and of the order of choices.
    budgets: token budgets at which accuracy is reported; empty takes powers of two up to `max_new_tokens`.
    released: the first and last contest day of the problems used (LiveCodeBench), as YYYY-MM-DD; empty
      takes all.
    level: coverage of the intervals.
    """

    benchmark: str
    file: str | None = None
    tasks: tuple[SourceConfig, ...] = ()
    limit: int | None = pydantic.Field(None, ge=1)
    instruction: str | None = None
    system: str | None = None
    samples: int = pydantic.Field(1, ge=1)
    k: tuple[int, ...] = (1,)
    thinking: Literal["on", "off", "both"] = "on"
    temperature: float = pydantic.Field(0.6, ge=0)
    top_p: float = pydantic.Field(0.95, gt=0, le=1)
    top_k: int = pydantic.Field(20, ge=0)
    min_p: float = pydantic.Field(0.0, ge=0, le=1)
    max_new_tokens: int = pydantic.Field(4096, ge=1)
    thinking_budget: int | None = pydantic.Field(None, ge=0)
    seed: int = 0
    budgets: tuple[int, ...] = ()
    released: tuple[str, ...] = ()
    level: float = pydantic.Field(0.95, gt=0, lt=1)
    grading: CorrectConfig = CorrectConfig()

    @pydantic.model_validator(mode="after")
    def _k_within_samples(self):
        if bad := [k for k in self.k if not 1 <= k <= self.samples]:
            raise ValueError(f"k: pass@{bad[0]} needs between 1 and samples = {self.samples}; draw more samples")
        if self.released and len(self.released) != 2:
            raise ValueError(f"released: expected a first and a last day, got {list(self.released)}")
        for day in self.released:
            try:
                datetime.date.fromisoformat(day)
            except ValueError:
                raise ValueError(f"released: expected days as YYYY-MM-DD, got {day!r}") from None
        if any(b < 1 for b in self.budgets):
            raise ValueError(f"budgets: expected positive numbers of tokens, got {self.budgets}")
        return self

    @property
    def modes(self) -> tuple[bool, ...]:
        """The thinking modes, in the order of the report."""
        return {"on": (True,), "off": (False,), "both": (True, False)}[self.thinking]


def fingerprint(settings: dict) -> str:
    """Twelve hex digits that change with any setting."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
