"""GRPO and its kin: the policy learns from groups of its own samples."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field, model_validator

from dqjax.config import Section
from dqjax.losses.logprob import token_logprobs
from dqjax.losses.policy_gradient import OBJECTIVES, Correction, Objective, PolicyOptions, policy_gradient_loss
from dqjax.losses.reduce import Totals, mask_sequences, totals_of, weigh_tokens
from dqjax.sharding import Rules
from dqjax.steps.accumulate import split_batch
from dqjax.types import Batch, LanguageModel, Loss, Metrics, Params


class GRPOConfig(Section):
    """objective: GRPO. The paper names GRPO [P], not its variant; defaults are TRL 1.16's, taken over as ours [D].

    loss: surrogate and reduction. `grpo` mean of sequence means; `bnpo`, `dapo` mean over tokens of the global batch;
      `dr_grpo` divided by the longest completion allowed; `cispo`; `sapo`.
    ratio: importance ratio of each `token`, or of the `sequence` (GSPO).
    clip_low, clip_high: ε; 0.2. DAPO's clip-higher is 0.28.
    ratio_limit: δ of two-sided clipping, above 1 + clip_high; null for none.
    ratio_cap: the largest weight of `cispo`; 5 is ScaleRL's.
    baseline: of a group: `mean`, or `leave_one_out` (RLOO; with scale: none).
    scale: what advantages are divided by: std of the `group` or the `batch`, or `none`.
    kl: β of the KL to the reference; 0 needs no reference, 0.04 where it is used [S].
    kl_corrected: multiply the KL estimate by the ratio.
    mask_truncated: completions cut at the limit teach nothing, but stay in their group's baseline.
    correction: of the sampler's mismatch: `none`, or weights of each token or of whole sequences, truncated to the
      bounds or masked outside of them. Off [D]: our sampler runs the trainer's own graph and weights.
    correction_low, correction_high: the bounds; null is open.
    max_sampler_gap: the run stops when |log π_train − log π_sample| of any token exceeds it; null never [D].
    """

    kind: Literal["grpo"] = "grpo"
    loss: Objective = "dapo"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    ratio_limit: float | None = None
    ratio_cap: float = Field(5.0, gt=0)
    baseline: Literal["mean", "leave_one_out"] = "mean"
    scale: Literal["group", "batch", "none"] = "group"
    kl: float = Field(0.0, ge=0)
    kl_corrected: bool = True
    mask_truncated: bool = False
    correction: Correction = "none"
    correction_low: float | None = Field(None, ge=0)
    correction_high: float | None = Field(3.0, gt=0)
    max_sampler_gap: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _bounds_in_order(self):
        if self.ratio_limit is not None and self.ratio_limit <= 1 + self.clip_high:
            most = 1 + self.clip_high
            raise ValueError(f"ratio_limit: expected more than 1 + clip_high = {most:g}, got {self.ratio_limit:g}")
        low, high = self.correction_low, self.correction_high
        if low is not None and high is not None and low >= high:
            raise ValueError(f"correction_low: {low:g} must lie under correction_high: {high:g}")
        if self.correction.endswith("truncate") and low is None and high is None:
            raise ValueError(f"correction: {self.correction} needs correction_low or correction_high")
        return self

    def options(self) -> PolicyOptions:
        """The constants of the loss."""
        return PolicyOptions(
            surrogate=OBJECTIVES[self.loss][0],
            ratio=self.ratio,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            ratio_limit=self.ratio_limit,
            ratio_cap=self.ratio_cap,
            kl=self.kl,
            kl_corrected=self.kl_corrected,
            correction=self.correction,
            correction_low=self.correction_low,
            correction_high=self.correction_high,
        )


def weigh_samples(batch: Batch, objective: Objective, *, max_length: int, mask_truncated: bool = False) -> Batch:
    """The batch of an update with the token weights of an objective, on the host, before it is split.

    Args:
      batch: numpy arrays; `token_weight` is not 0 on completion tokens. `side["truncated"]` `[B, S]`, 1 for samples cut
        at the limit, where `mask_truncated`.
      max_length: the longest completion allowed, for `dr_grpo`.
    """
    return weigh_updates([batch], objective, max_length=max_length, mask_truncated=mask_truncated)[0]


def weigh_updates(
    batches: Sequence[Batch], objective: Objective, *, max_length: int, mask_truncated: bool = False
) -> list[Batch]:
    """`weigh_samples` for the parts of a rollout, each the batch of an update.

    As in TRL, `dapo` and `cispo` divide by the mean tokens of the parts, so that a token weighs the same in each; the
    other objectives divide by what their own part holds.
    """
    if mask_truncated:
        batches = [mask_sequences(batch, np.asarray(batch.side["truncated"]) == 1) for batch in batches]
    totals = None
    if objective in ("dapo", "cispo"):
        counts = [totals_of(batch) for batch in batches]
        totals = Totals(*(sum(numbers) / len(batches) for numbers in zip(*counts, strict=True)))
    reduction = OBJECTIVES[objective][1]
    return [weigh_tokens(batch, reduction, totals=totals, length=max_length) for batch in batches]


def make_grpo_loss(
    model: LanguageModel,
    rules: Rules,
    options: PolicyOptions = PolicyOptions(),
    *,
    temperature: float = 1.0,
    vocab: int | None = None,
) -> Loss:
    """The policy-gradient loss of a packed batch of samples.

    The batch needs `side["advantage"]` `[B, S]`, token weights by `weigh_samples`, and by the target's place, `[B, T]`:
    `old_logprobs` when the policy has moved since it sampled (several updates a rollout), `sample_logprobs` to measure
    or correct the sampler, `reference_logprobs` where the KL counts.

    Args:
      temperature: the sampling temperature: the policy is the distribution that was sampled from.
      vocab: real entries of the output table, those that can be sampled.
    """
    logprobs = make_token_logprobs(model, rules, temperature=temperature, vocab=vocab)

    def loss(params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        logprob, entropy = logprobs(params, batch)
        return policy_gradient_loss(
            logprob,
            entropy,
            batch,
            options,
            old=batch.side.get("old_logprobs"),
            sampled=batch.side.get("sample_logprobs"),
            reference=batch.side.get("reference_logprobs"),
        )

    return loss


def make_token_logprobs(
    model: LanguageModel, rules: Rules, *, temperature: float = 1.0, vocab: int | None = None
) -> Callable[[Params, Batch], tuple[Float[Array, "B T"], Float[Array, "B T"]]]:
    """A function (params, batch) → (log-probability, entropy) of the trained targets."""

    def logprobs(params: Params, batch: Batch) -> tuple[Array, Array]:
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        table, mask = model.output_table(params), batch.token_weight != 0
        return token_logprobs(hidden, table, batch.targets, mask, rules, temperature=temperature, vocab=vocab)

    return logprobs


def make_fixed_logprobs(
    model: LanguageModel, rules: Rules, *, parts: int = 1, temperature: float = 1.0, vocab: int | None = None
) -> Callable[[Params, Batch], Float[Array, "B T"]]:
    """A function (params, batch) → log-probability of the trained targets, without a gradient: old and reference values.

    Args:
      parts: micro-batches that the batch is taken in, as for the update.
    """
    logprobs = make_token_logprobs(model, rules, temperature=temperature, vocab=vocab)

    def fixed(params: Params, batch: Batch) -> Array:
        split = jax.lax.map(lambda micro: logprobs(params, micro)[0], split_batch(batch, parts))
        return split.swapaxes(0, 1).reshape(batch.tokens.shape)

    return fixed
