"""Policy-gradient surrogates over packed rows: GRPO and its kin, one weighted sum.

Per token, with A the advantage of its sample and ρ = exp(log π − log π_old), a token's or the geometric mean of its
sequence's (GSPO)::

    clip     −min(ρ′ A, clip(ρ, 1 − ε_low, 1 + ε_high) A),  ρ′ = min(ρ, δ)       PPO, GRPO, DAPO, Dr. GRPO
    cispo    −stop(min(ρ, c)) A log π                                            MiniMax-M1, ScaleRL
    sapo     −(4/τ) σ(τ (ρ − 1)) A,  τ by the sign of A                          SAPO

times the sampler's correction, plus β k3, k3 = e^d − d − 1, d = log π_ref − log π. The names of published objectives
are pairs of a surrogate and a reduction (`losses.reduce`); `OBJECTIVES` lists them.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dqjax.losses.reduce import Reduction, on_tokens, sequence_sums
from dqjax.types import Batch, Max, Mean, Metrics

Surrogate = Literal["clip", "cispo", "sapo"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Objective = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo"]

OBJECTIVES: dict[Objective, tuple[Surrogate, Reduction]] = {
    "grpo": ("clip", "sequence_mean"),  # https://arxiv.org/abs/2402.03300, eq. 3
    "bnpo": ("clip", "token_mean"),
    "dr_grpo": ("clip", "fixed_length"),  # https://arxiv.org/abs/2503.20783
    "dapo": ("clip", "token_mean"),  # https://arxiv.org/abs/2503.14476, eq. 8
    "cispo": ("cispo", "token_mean"),  # https://arxiv.org/abs/2506.13585, eq. 4
    "sapo": ("sapo", "sequence_mean"),  # https://arxiv.org/abs/2511.20347
}


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """Which surrogate, and its constants.

    Attributes:
      surrogate: see the module.
      ratio: ρ of each "token", or of the "sequence" (GSPO, https://arxiv.org/abs/2507.18071, eq. 7).
      clip_low, clip_high: ε_low, ε_high of `clip`.
      ratio_limit: δ > 1 + ε_high, the largest ρ for A < 0 too (two-sided clipping,
        https://arxiv.org/abs/2505.07291), or None.
      ratio_cap: c of `cispo`.
      sapo_temperatures: τ for A > 0 and for A ≤ 0.
      kl: β; 0 leaves the reference out.
      kl_corrected: multiply k3 by ρ, which makes its gradient that of the reverse KL off the policy
        (https://arxiv.org/abs/2512.02556, section 3.1), as TRL 1.16 does by default.
      correction: what is done about π_old ≠ the sampler's π: weights exp(log π_old − log π_sampler) of tokens, or of
        whole sequences (their product), truncated to the bounds, or masked (0) outside of them.
      correction_low, correction_high: the bounds; None is open.
    """

    surrogate: Surrogate = "clip"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_limit: float | None = None
    ratio_cap: float = 5.0
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    kl: float = 0.0
    kl_corrected: bool = True
    correction: Correction = "none"
    correction_low: float | None = None
    correction_high: float | None = 3.0


def policy_gradient_loss(
    logprob: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    batch: Batch,
    options: PolicyOptions,
    *,
    old: Float[Array, "B T"] | None = None,
    sampled: Float[Array, "B T"] | None = None,
    reference: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Σ token_weight · (correction · surrogate + β k3) over the batch.

    Args:
      logprob, entropy: of the targets under the policy, at the sampling temperature; nats.
      batch: `token_weight` carries mask and reduction; `side["advantage"]` `[B, S]`.
      old: log π_old when the batch was sampled; None means that the policy is still the one that sampled (ρ = 1).
      sampled: what the sampler reported; needed by a correction, and measured where given.
      reference: log π_ref; needed where β > 0.

    Returns:
      The sum, and the metrics: means over tokens `loss`, `entropy`, `clip_low`, `clip_high` (shares of tokens whose
      gradient is cut), `kl`, `approximate_kl` (k3 of the policy's own move), `sampler_kl` (k3) and `correction`;
      largest `ratio`, `inverse_ratio` and `sampler_gap` = |log π_old − log π_sampler|.

    Raises:
      ValueError: `options` need log-probabilities that are not there.
    """
    if options.correction != "none" and sampled is None:
        raise ValueError(f"correction {options.correction!r} needs the sampler's values: side 'sample_logprobs'")
    if options.kl and reference is None:
        raise ValueError(f"kl = {options.kl} needs a reference: side 'reference_logprobs'")
    mask, columns = batch.token_weight != 0, batch.side["advantage"].shape[1]
    # Masked places hold anything: 0 there keeps them out of every exponential, forward and backward.
    logprob = jnp.where(mask, logprob, 0)
    constant = lambda x: jax.lax.stop_gradient(jnp.where(mask, x, 0))  # noqa: E731
    advantage = constant(on_tokens(batch.side["advantage"], batch.sequence_index))
    old = constant(logprob if old is None else old)
    token_ratio = log_ratio = logprob - old
    if options.ratio == "sequence":
        log_ratio = _sequence_mean(log_ratio, mask, batch, columns)
    ratio = jnp.exp(log_ratio)
    loss, clipped_low, clipped_high = _surrogate(ratio, logprob, advantage, options)
    means = {"entropy": entropy, "clip_low": clipped_low, "clip_high": clipped_high}
    means["approximate_kl"] = _k3(-token_ratio)
    extremes = {"ratio": ratio, "inverse_ratio": 1 / ratio}
    if sampled is not None:
        drift = old - constant(sampled)
        means["sampler_kl"] = _k3(drift)
        extremes["sampler_gap"] = jnp.abs(drift)
        if options.correction != "none":
            weight = _correction(drift, batch, columns, options)
            loss, means["correction"] = loss * weight, weight
    if options.kl:
        kl = _k3(constant(reference) - logprob)
        kl = kl * ratio if options.kl_corrected else kl
        loss, means["kl"] = loss + options.kl * kl, kl
    loss = jnp.where(mask, loss, 0)
    means["loss"] = loss
    count = jnp.sum(mask.astype(jnp.float32))
    metrics = {name: Mean(jnp.sum(jnp.where(mask, x, 0)), count) for name, x in means.items()}
    metrics |= {name: Max(jnp.max(jnp.where(mask, x, 0), initial=0)) for name, x in extremes.items()}
    return jnp.sum(batch.token_weight * loss), jax.lax.stop_gradient(metrics)


def _surrogate(
    ratio: Float[Array, "B T"], logprob: Float[Array, "B T"], advantage: Float[Array, "B T"], options: PolicyOptions
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
    """The surrogate, and the tokens whose update is cut from below (A < 0) and from above (A > 0)."""
    never = jnp.zeros(ratio.shape, bool)
    match options.surrogate:
        case "clip":
            clipped = jnp.clip(ratio, 1 - options.clip_low, 1 + options.clip_high)
            limited = ratio if options.ratio_limit is None else jnp.minimum(ratio, options.ratio_limit)
            low = (ratio < 1 - options.clip_low) & (advantage < 0)
            high = (ratio > 1 + options.clip_high) & (advantage > 0)
            return -jnp.minimum(limited * advantage, clipped * advantage), low, high
        case "cispo":
            capped = jax.lax.stop_gradient(jnp.minimum(ratio, options.ratio_cap))
            return -capped * advantage * logprob, never, (ratio > options.ratio_cap) & (advantage > 0)
        case "sapo":
            positive, negative = options.sapo_temperatures
            temperature = jnp.where(advantage > 0, positive, negative)
            return -4 / temperature * jax.nn.sigmoid(temperature * (ratio - 1)) * advantage, never, never


def _correction(
    drift: Float[Array, "B T"], batch: Batch, columns: int, options: PolicyOptions
) -> Float[Array, "B T"]:
    """Importance weights of the tokens for a sampler that is not quite the policy; 1 where they agree."""
    level, action = options.correction.split("_")
    if level == "sequence":
        drift = on_tokens(sequence_sums(drift, batch.sequence_index, columns), batch.sequence_index)
    low = -jnp.inf if options.correction_low is None else options.correction_low
    high = jnp.inf if options.correction_high is None else options.correction_high
    weight = jnp.exp(drift)
    if action == "truncate":
        return jnp.clip(weight, low, high)
    return jnp.where((weight < low) | (weight > high), 0, weight)


def _sequence_mean(
    x: Float[Array, "B T"], mask: Bool[Array, "B T"], batch: Batch, columns: int
) -> Float[Array, "B T"]:
    """At each trained token, the mean of `x` over the trained tokens of its sequence."""
    lengths = sequence_sums(mask.astype(x.dtype), batch.sequence_index, columns)
    means = sequence_sums(x, batch.sequence_index, columns) / jnp.maximum(lengths, 1)
    return jnp.where(mask, on_tokens(means, batch.sequence_index), 0)


def _k3(d: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """e^d − d − 1 ≥ 0: with d = log q − log p and samples of p, an unbiased estimate of KL(p‖q) (Schulman, 2020)."""
    return jnp.expm1(d) - d
