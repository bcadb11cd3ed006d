"""AdamW with warm-up and decay, from the `optimizer` section of a config."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from dqjax.config import Section


class OptimizerConfig(Section):
    """optimizer: AdamW. The defaults are those of the DistilQwen recipes (SFT: 2e-5, cosine, warm-up 0.1).

    learning_rate: peak. schedule: shape after the warm-up. warmup: share of the steps (below 1) or their number.
    end_factor: last rate over the peak. weight_decay: on matrices and tables only, not on norms and biases.
    clip_norm: gradients longer than this are scaled down to it; null for none. mu_dtype: of the first moment
    (bfloat16 saves 2 bytes a parameter).
    """

    learning_rate: float = Field(2e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.1, ge=0)
    end_factor: float = Field(0.0, ge=0, le=1)
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    clip_norm: float | None = Field(1.0, gt=0)
    mu_dtype: Literal["float32", "bfloat16"] = "float32"


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of step n of `steps`: linear from 0 over the warm-up, then the configured decay."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    warmup = min(warmup, max(steps - 1, 0))
    peak, end = config.learning_rate, config.learning_rate * config.end_factor
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, max(steps - warmup, 1), config.end_factor),
        "linear": optax.linear_schedule(peak, end, max(steps - warmup, 1)),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), decay], [warmup]) if warmup else decay


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW (https://arxiv.org/abs/1711.05101)."""
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
        mu_dtype=jnp.dtype(config.mu_dtype),
    )
    return adamw if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def decayed(params: Any) -> Any:
    """True for matrices and tables, False for norm scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)
