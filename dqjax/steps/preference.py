"""Preference training: DPO, and CogPO with a β for each pair."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field

from dqjax.config import Section
from dqjax.losses.bradley_terry import mean_by_group, mean_over_pairs
from dqjax.losses.logprob import token_logprobs
from dqjax.losses.pairs import pairs_of
from dqjax.losses.preference import preference_loss, sequence_logprobs
from dqjax.losses.reduce import sequence_sums
from dqjax.sharding import Rules
from dqjax.types import Batch, LanguageModel, Loss, Metrics, Params


class PreferenceConfig(Section):
    """objective: DPO or CogPO on pairs.

    loss: `cogpo` reads β from each pair's `beta` column (small, medium, large gap: 0.1, 0.2, 0.5 [D]; the form is the
      paper family's [S, E]); `dpo` uses `beta` for all.
    beta: of `dpo`; 0.1 [S].
    length_normalised: divide each log-ratio by its completion's tokens (Tülu 3's form; β 5 there) [D: off].
    reference: `frozen` keeps a second copy of the starting weights on the mesh; `cached` computes what they say of each
      pair once, before training, and keeps it in RUN/reference by sample id: less memory and a quarter less work [D].
    """

    kind: Literal["preference"] = "preference"
    loss: Literal["cogpo", "dpo"] = "cogpo"
    beta: float = Field(0.1, gt=0)
    length_normalised: bool = False
    reference: Literal["cached", "frozen"] = "frozen"


def make_preference_loss(
    model: LanguageModel,
    rules: Rules,
    *,
    beta: float | None = None,
    length_normalised: bool = False,
    reference: Literal["cached", "frozen"] = "cached",
    vocab: int | None = None,
    groups: dict[str, int] | None = None,
) -> Loss:
    """The preference loss of a packed batch of pairs.

    The batch needs the side arrays of `losses.pairs` (weights by `weigh_pairs`), `beta` `[B, S]` where β is None, and
    `reference_logprob` `[B, S]` where the reference is cached. `token_weight` is not 0 on the completions' tokens; its
    size plays no part. Metrics: those of `preference_loss`, `logprob_chosen` and `logprob_rejected` of whole
    completions, `accuracy_by_<name>` of groups.

    Args:
      beta: β of DPO; None is CogPO.
      reference: "frozen" computes the reference's log-probabilities with `frozen["reference"]`.
      vocab: real entries of the output table.
      groups: side arrays to break the accuracy down by, with their number of values (`{"gap": 3}`).
    """
    logprobs = make_sequence_logprobs(model, rules, vocab=vocab)

    def loss(params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        pairs, policy = pairs_of(batch), logprobs(params, batch)
        fixed = batch.side["reference_logprob"] if reference == "cached" else logprobs(frozen["reference"], batch)
        ratio = policy - jax.lax.stop_gradient(fixed)
        if length_normalised:
            trained = (batch.token_weight != 0).astype(jnp.float32)
            ratio = ratio / jnp.maximum(sequence_sums(trained, batch.sequence_index, policy.shape[1]), 1)
        total, metrics = preference_loss(ratio, pairs, batch.side["beta"] if beta is None else beta)
        policy, ratio = jax.lax.stop_gradient((policy, ratio))
        for name, x in zip(("logprob_chosen", "logprob_rejected"), pairs.split(policy)):
            metrics[name] = mean_over_pairs(x, pairs)
        chosen, rejected = pairs.split(ratio)
        right = (chosen > rejected).astype(jnp.float32)
        for name, size in (groups or {}).items():
            metrics[f"accuracy_by_{name}"] = mean_by_group(right, batch.side[name], size, pairs)
        return total, metrics

    return loss


def make_sequence_logprobs(
    model: LanguageModel, rules: Rules, *, vocab: int | None = None
) -> Callable[[Params, Batch], Float[Array, "B S"]]:
    """A function (params, batch) → log p of each sequence's trained tokens: what a cache of reference values holds."""

    def logprobs(params: Params, batch: Batch) -> Float[Array, "B S"]:
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        logprob, _ = token_logprobs(
            hidden, model.output_table(params), batch.targets, batch.token_weight != 0, rules, vocab=vocab
        )
        return sequence_logprobs(logprob, batch, batch.side["pair_id"].shape[1])

    return logprobs
