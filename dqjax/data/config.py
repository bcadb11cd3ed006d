"""The `data:` section of a config: where rows come from, how they become training documents, in what order."""

import pathlib
from typing import Any, Literal

import pydantic

from dqjax.config import Section

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


class ColumnsConfig(Section):
    """Names of the columns, where detection cannot guess them; a dotted name reads inside a mapping (`metadata.level`).

    A key left out is looked up under its usual names (dqjax.data.records lists them).
    """

    id: str | None = None
    messages: str | None = None
    system: str | None = None
    prompt: str | None = None
    response: str | None = None
    reasoning: str | None = None
    answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    thinking: str | None = None
    difficulty: str | None = None


class SourceConfig(Section):
    """One source of rows: a file or folder, a `datasets` name, or a reasoning-gym task.

    Exactly one of:
      path: a jsonl or parquet file, a folder of them, or a glob.
      hub: a name that `datasets.load_dataset` knows; `subset` and `split` go with it.
      task: a reasoning-gym task; `seed`, `size`, `params` (the task's own options) and `chain` go with it.

    How much of it:
      weight: copies of the source in an epoch; 0.5 takes a fixed, seeded half of its documents.
      share: instead of `weight`, the part of an epoch's documents that comes from here (all sources, or none).

    `chain` writes worked chains for the task `chain_sum`: digit `columns`, `running` sums, or the bare `answer`.
    reasoning-gym seeds item i with seed + i, so seeds of two sources must differ by more than their sizes.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    task: str | None = None
    seed: int = 0
    size: int = pydantic.Field(1000, ge=1)
    params: dict[str, Any] = {}
    chain: Literal["columns", "running", "answer"] | None = None
    name: str | None = None
    weight: float = pydantic.Field(1.0, gt=0)
    share: float | None = pydantic.Field(None, gt=0, le=1)
    columns: ColumnsConfig = ColumnsConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        """A bare text is a path when it looks like one, else a hub name."""
        if isinstance(values, str):
            is_file = values.endswith(FILE_SUFFIXES) or any(c in values for c in "*?[") or pathlib.Path(values).exists()
            return {"path" if is_file else "hub": values}
        return values

    @pydantic.model_validator(mode="after")
    def _one_kind(self):
        given = [key for key in ("path", "hub", "task") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"a source has one of path, hub, task; got {' and '.join(given) or 'none'}")
        if self.chain is not None and self.task != "chain_sum":
            raise ValueError(f"chain: worked chains exist for the task chain_sum, not for {self.task or given[0]}")
        return self

    @property
    def label(self) -> str:
        """The name under which losses and counts of this source are reported."""
        return self.name or self.task or self.hub or pathlib.Path(self.path).stem


class StageConfig(Section):
    """One stage of the curriculum: rows with at_least <= difficulty < below, for `epochs` passes.

    A bound left out is open; rows without a difficulty belong only to a stage without bounds.
    """

    at_least: float | None = None
    below: float | None = None
    epochs: int = pydantic.Field(1, ge=1)

    @pydantic.model_validator(mode="after")
    def _bounds_in_order(self):
        if self.at_least is not None and self.below is not None and self.at_least >= self.below:
            raise ValueError(f"at_least: {self.at_least} must lie under below: {self.below}")
        return self


class CurriculumConfig(Section):
    """Stages by difficulty, trained one after the other, as the slow-thinking series of the paper trains [P].

    column: the column that holds the difficulty; without it, `columns.difficulty` and its usual names.
    """

    column: str | None = None
    stages: tuple[StageConfig, ...] = pydantic.Field(min_length=1)


class DataConfig(Section):
    """The `data:` section of a training config. Rows a batch come from `train:`.

    sources: where rows come from, most simply one path.
    columns: column names for all sources; a source's own `columns` go first.
    row_length: T, the tokens of a packed row.
    too_long: what happens to a document longer than T: `drop` (a cut chain loses its `</think>` and teaches endless
      thinking), `truncate`, or `split` into pieces of at most T.
    thinking: `on` trains turns that have a chain, in thinking mode; `off` trains all turns without their chains; `row`
      follows the row's `thinking` column, else trains a turn in thinking mode if it has a chain.
    no_think_share: with `on` or `row`, the share of rows trained without thinking all the same, drawn by id, so that a
      hybrid student keeps that mode.
    train_on_prompt: put prompts into the loss too.
    validation: a file of held-out rows, or the share of problems to hold out (0.02). Either way no held-out question,
      normalised, stays in the training rows.
    seed: order of rows, held-out problems, no-think rows.
    curriculum: stages by difficulty; without it one stage, repeated for as long as training lasts.
    max_bad_share: the run stops when more of the rows than this are unusable.
    quarantine: file for the unusable rows with file, line and reason.
    cache_dir: where tokenised documents are kept; by default dqjax/data under the user's cache folder.
    workers: processes that tokenise; by default as many as there are cores, at most 16; 1 stays in this process.
    prefetch: batches prepared ahead.
    """

    sources: tuple[SourceConfig, ...] = pydantic.Field(min_length=1)
    columns: ColumnsConfig = ColumnsConfig()
    row_length: int = pydantic.Field(4096, ge=2)
    too_long: Literal["drop", "truncate", "split"] = "drop"
    thinking: Literal["on", "off", "row"] = "row"
    no_think_share: float = pydantic.Field(0.0, ge=0, le=1)
    train_on_prompt: bool = False
    validation: str | float | None = None
    seed: int = 0
    curriculum: CurriculumConfig | None = None
    max_bad_share: float = pydantic.Field(0.01, ge=0, le=1)
    quarantine: str | None = None
    cache_dir: str | None = None
    workers: int | None = pydantic.Field(None, ge=1)
    prefetch: int = pydantic.Field(4, ge=1)

    @pydantic.field_validator("sources", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, dict)) else value

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        shares = [s.share for s in self.sources]
        if any(s is not None for s in shares):
            if None in shares:
                raise ValueError("sources: give every source a share, or none of them")
            if abs(sum(shares) - 1) > 1e-6:
                raise ValueError(f"sources: shares must add up to 1, got {sum(shares):g}")
        labels = [s.label for s in self.sources]
        if twice := sorted({x for x in labels if labels.count(x) > 1}):
            raise ValueError(f"sources: two are called {twice[0]!r}; give them a name each")
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise ValueError(f"validation: a share lies between 0 and 1, got {self.validation:g}")
        return self
