"""Direct preference optimisation: pairs judged by how far the policy has moved from a reference."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dqjax.losses.bradley_terry import mean_over_pairs
from dqjax.losses.pairs import Pairs
from dqjax.losses.reduce import sequence_sums
from dqjax.types import Batch, Metrics


def sequence_logprobs(logprob: Float[Array, "B T"], batch: Batch, columns: int) -> Float[Array, "B {columns}"]:
    """log p(completion | prompt): Σ of the targets' log-probabilities over trained tokens (`token_weight` not 0)."""
    trained = jnp.where(batch.token_weight != 0, logprob, 0)
    return sequence_sums(trained, batch.sequence_index, columns)


def preference_loss(
    logprob: Float[Array, "B S"],
    reference: Float[Array, "B S"],
    pairs: Pairs,
    beta: Float[Array, "B S"] | float,
    *,
    lengths: Float[Array, "B S"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Σ weight · −log σ(β_i · [(log π − log π_ref)(chosen) − (log π − log π_ref)(rejected)]).

    With a number β it is DPO (https://arxiv.org/abs/2305.18290, eq. 7). With one β a pair it is CogPO, which trusts a
    pair the more the wider its cognitive gap. With `lengths` each log-ratio is divided by the tokens of its completion
    (Tülu 3, https://arxiv.org/abs/2411.15124, length-normalised DPO; TRL's `sigmoid_norm`), so that a long chain does
    not outweigh a short one; β is then some 50 times larger for the same pull (5 there).

    Args:
      logprob, reference: log-probabilities of the completions, nats; the reference is a constant.
      beta: β > 0, at the chosen sequence's column.
      lengths: trained tokens of each sequence.

    Returns:
      The weighted sum, and the metrics `loss`, `accuracy` (a tie is wrong), `margin`, `reward_chosen` and
      `reward_rejected` (β · log-ratio), `logprob_chosen` and `logprob_rejected`.
    """
    ratio = logprob - jax.lax.stop_gradient(reference)
    if lengths is not None:
        ratio = ratio / jnp.maximum(lengths, 1)
    chosen, rejected = pairs.split(ratio)
    beta = jnp.where(pairs.present, jax.lax.stop_gradient(beta), 0)
    loss = -jax.nn.log_sigmoid(beta * (chosen - rejected))
    total = jnp.sum(pairs.weight * loss)
    logprob_chosen, logprob_rejected = pairs.split(logprob)
    values = {
        "loss": loss,
        "accuracy": (chosen > rejected).astype(jnp.float32),
        "margin": beta * (chosen - rejected),
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
        "logprob_chosen": logprob_chosen,
        "logprob_rejected": logprob_rejected,
    }
    return total, jax.lax.stop_gradient({name: mean_over_pairs(x, pairs) for name, x in values.items()})
