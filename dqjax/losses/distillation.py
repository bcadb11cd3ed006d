"""Divergences from a teacher's distribution over the next token, summed over a packed batch without full logits.

The teacher comes as its own hidden states and output table, or as its k most likely tokens at each place.
Definitions are those of `kernels.linear_logprob.linear_kl` (GKD, https://arxiv.org/abs/2306.13649, eq. 1, in TRL's
convention), with M = (1 − β) S + β T::

    β = 0   KL(T‖S), forward        β = 1   KL(S‖T), reverse        else   β KL(T‖M) + (1 − β) KL(S‖M)

Both sides are softened by the same temperature; there is no temperature² factor.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.linear_logprob import api as kernel
from dqjax.losses.shard import per_device, rows_spec, table_spec
from dqjax.sharding import Rules


def head_divergence(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    teacher_hidden: Float[Array, "B T E"],
    teacher_table: Float[Array, "U E"],
    weight: Float[Array, "B T"],
    rules: Rules,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    vocab: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Σ weight · divergence of student and teacher, and the divergence of each place (0 where the weight is 0; nats).

    Gradients go to `hidden` and `table` only; the divergences carry none.

    Args:
      vocab: tokens that both tables share, which come first in both; each side is normalised over these. Needed where
        the tables differ in width (152064 and 151936 rows of one tokenizer).
    """
    width = max(len(table), len(teacher_table))
    columns = table_spec(rules, (width, table.shape[1]))
    if columns[0] is not None:  # shards of both tables must hold the same tokens
        table, teacher_table = _padded(table, width), _padded(teacher_table, width)
    rows = rows_spec(rules, hidden.shape[0])

    def local(hidden, table, teacher_hidden, teacher_table, weight):
        teacher = kernel.TeacherHead(teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_table)
        return _divergence(hidden, table, teacher, weight, beta, "bucket", temperature, vocab, columns[0], backend)

    local = per_device(local, rules, (rows, columns, rows, columns, rows), (rows, rows))
    total, divergence = local(hidden, table, teacher_hidden, teacher_table, weight)
    return jnp.sum(total), divergence


def top_k_divergence(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    ids: Int[Array, "B T K"],
    logprobs: Float[Array, "B T K"],
    weight: Float[Array, "B T"],
    rules: Rules,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    tail: str = "bucket",
    vocab: int | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """As `head_divergence`, from the teacher's K most likely tokens at each place.

    Args:
      ids: distinct tokens at each place of `targets`, negative where there is none.
      logprobs: under the teacher's whole softmax at this `temperature`: a cache serves the one it was written at.
      tail: "bucket": all other tokens are one outcome with the mass that is left; "renormalise": they have none.
      vocab: real entries of the student's table.
    """
    columns, rows = table_spec(rules, table.shape), rows_spec(rules, hidden.shape[0])

    def local(hidden, table, ids, logprobs, weight):
        K = ids.shape[-1]
        teacher = kernel.TopK(ids.reshape(-1, K), logprobs.reshape(-1, K).astype(jnp.float32))
        return _divergence(hidden, table, teacher, weight, beta, tail, temperature, vocab, columns[0], backend)

    local = per_device(local, rules, (rows, columns, rows, rows, rows), (rows, rows))
    total, divergence = local(hidden, table, ids, logprobs, weight)
    return jnp.sum(total), divergence


def _divergence(hidden, table, teacher, weight, beta, tail, temperature, vocab, axis_name, backend):
    total, divergence = kernel.linear_kl(
        hidden.reshape(-1, hidden.shape[-1]),
        table,
        teacher,
        weight.reshape(-1),
        beta=beta,
        tail=tail,
        vocab=vocab,
        temperature=temperature,
        axis_name=axis_name,
        backend=backend,
    )
    return total[None], divergence.reshape(weight.shape)


def _padded(table: Float[Array, "V D"], width: int) -> Float[Array, "W D"]:
    return jnp.pad(table, ((0, width - len(table)), (0, 0)))
