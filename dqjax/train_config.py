"""The config of a training run: its sections, and what they must say together."""

from typing import Annotated, Any

import pydantic
from pydantic import Field

from dqjax.config import Section
from dqjax.data.config import DataConfig
from dqjax.load import ModelSection
from dqjax.models.lora import LoRAConfig
from dqjax.objectives.groups import PolicyConfig
from dqjax.optim import OptimizerConfig
from dqjax.sharding import MeshConfig
from dqjax.steps.distill import DistillConfig
from dqjax.steps.preference import PreferenceConfig
from dqjax.steps.reward import RewardConfig
from dqjax.steps.scorer import ScorerConfig
from dqjax.steps.sft import SFTConfig

Objective = Annotated[
    SFTConfig | DistillConfig | RewardConfig | ScorerConfig | PreferenceConfig | PolicyConfig, Field(discriminator="kind")
]


class TrainConfig(Section):
    """train: how long and how much at a time.

    run_dir: folder of the run, on a disk that all hosts share; an existing one is resumed. steps: updates in all; or
    epochs: passes over the data (a curriculum counts its own). batch_rows: packed rows of one update, over all devices.
    accumulate: micro-batches they are taken in, to save memory; the result is the same. seed: of what a step draws.
    eval_every: steps between evaluations. max_skipped: steps with a non-finite loss or gradient, which change nothing,
    before the run gives up. sample_tokens: length of the sample at each evaluation; 0 for none.
    """

    run_dir: str
    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch_rows: int = Field(ge=1)
    accumulate: int = Field(1, ge=1)
    seed: int = 0
    eval_every: int = Field(500, ge=1)
    max_skipped: int = Field(10, ge=0)
    sample_tokens: int = Field(256, ge=0)


class CheckpointConfig(Section):
    """checkpoint: every so many steps, and the last; keep: how many of the newest (the best is kept besides)."""

    every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)


class LogConfig(Section):
    """log: every so many steps one record in metrics.jsonl and TensorBoard; wandb: project name (extra `wandb`)."""

    every: int = Field(10, ge=1)
    wandb: str | None = None


class Config(Section):
    """A training run."""

    objective: Objective
    model: ModelSection
    lora: LoRAConfig | None = None
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short_objective(cls, values: Any) -> Any:
        """`objective: sft` is short for `objective: {kind: sft}`."""
        if isinstance(values, dict) and isinstance(values.get("objective"), str):
            values = {**values, "objective": {"kind": values["objective"]}}
        return values

    @pydantic.model_validator(mode="after")
    def _length_of_the_run(self):
        given = [self.train.steps is not None, self.train.epochs is not None, self.data.curriculum is not None]
        if sum(given) != 1:
            raise ValueError("train: give one of train.steps, train.epochs, data.curriculum (whose stages count epochs)")
        return self
