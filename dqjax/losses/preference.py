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
    ratio: Float[Array, "B S"], pairs: Pairs, beta: Float[Array, "B S"] | float
) -> tuple[Float[Array, ""], Metrics]:
    """Σ weight · −log σ(β_i · (ratio(chosen) − ratio(rejected))), ratio = log π(y) − log π_ref(y).

    With a number β it is DPO (https://arxiv.org/abs/2305.18290, eq. 7). With one β a pair it is CogPO, which pulls the
    harder the wider a pair's cognitive gap is. With each ratio divided by the tokens of its completion it is the
    length-normalised DPO of Tülu 3 (https://arxiv.org/abs/2411.15124; TRL's `sigmoid_norm`): a long chain does not
    outweigh a short one. A ratio a token is small, so β is larger there (5 in Tülu 3).

    Args:
      ratio: of each sequence, nats.
      beta: β > 0, at the chosen sequence's column.

    Returns:
      The weighted sum, and the metrics `loss`, `accuracy` (a tie is wrong), `margin`, `reward_chosen` and
      `reward_rejected` (β · ratio).
    """
    chosen, rejected = pairs.split(ratio)
    beta = jnp.where(pairs.present, jax.lax.stop_gradient(beta), 0)
    loss = -jax.nn.log_sigmoid(beta * (chosen - rejected))
    values = {
        "loss": loss,
        "accuracy": (chosen > rejected).astype(jnp.float32),
        "margin": beta * (chosen - rejected),
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
    }
    metrics = {name: mean_over_pairs(x, pairs) for name, x in values.items()}
    return jnp.sum(pairs.weight * loss), jax.lax.stop_gradient(metrics)
