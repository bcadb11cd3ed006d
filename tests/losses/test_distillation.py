"""Divergences on packed batches: widths, split tables, top-k rows; TRL's values are in tests/steps/test_distill.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.distillation import head_divergence, top_k_divergence
from dqjax.sharding import Rules, make_mesh

B, T, D, E, V, WIDER, SHARED = 8, 5, 6, 4, 16, 20, 13


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.6 * rng.normal(size=shape), jnp.float32)  # noqa: E731
    weight = jnp.asarray(rng.uniform(size=(B, T)) * (rng.random((B, T)) < 0.7), jnp.float32)
    return draw(B, T, D), draw(V, D), draw(B, T, E), draw(WIDER, E), weight


def rules(**sizes) -> Rules:
    return Rules(make_mesh(**sizes)) if sizes else Rules(make_mesh(devices=jax.devices()[:1]))


def graded(f, hidden, table):
    """Value, divergences and gradients of a divergence in the student."""
    (value, divergence), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, table)
    return jax.device_get((value, divergence, grads))


def by_hand(beta, temperature):
    """The definition on the shared tokens, from full distributions."""
    hidden, table, theirs, their_table, weight = arrays()

    def loss(hidden, table):
        logp = jax.nn.log_softmax((hidden @ table.T)[..., :SHARED] / temperature)
        logq = jax.nn.log_softmax((theirs @ their_table.T)[..., :SHARED] / temperature)
        p, q = jnp.exp(logp), jnp.exp(logq)
        if beta in (0, 1):
            value = q * (logq - logp) if beta == 0 else p * (logp - logq)
        else:
            logm = jnp.log((1 - beta) * p + beta * q)
            value = beta * q * (logq - logm) + (1 - beta) * p * (logp - logm)
        divergence = jnp.where(weight != 0, value.sum(-1), 0)
        return jnp.sum(weight * divergence), divergence

    return graded(loss, hidden, table)


def close(got, want, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


@pytest.mark.parametrize("sizes", [{}, dict(data=4, tensor=2), dict(fsdp=2, tensor=4), dict(data=8)], ids=str)
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 2.0), (0.3, 1.0), (1.0, 0.5)])
def test_tables_of_different_widths_share_their_real_tokens(sizes, beta, temperature):
    """On one device, and with both tables split over the tensor axis."""
    hidden, table, theirs, their_table, weight = arrays()

    def loss(hidden, table):
        options = dict(beta=beta, temperature=temperature, vocab=SHARED)
        return head_divergence(hidden, table, theirs, their_table, weight, rules(**sizes), **options)

    close(graded(loss, hidden, table), by_hand(beta, temperature))


def test_widths_that_differ_need_to_say_what_they_share():
    hidden, table, theirs, their_table, weight = arrays()
    with pytest.raises(ValueError, match="pass vocab"):
        head_divergence(hidden, table, theirs, their_table, weight, rules())


@pytest.mark.parametrize("sizes", [{}, dict(data=4, tensor=2)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_top_k_with_every_token_is_the_teacher(sizes, beta):
    """k = the whole shared vocabulary, in any order: the cached rows say all that the teacher's head says."""
    hidden, table, theirs, their_table, weight = arrays()
    logq = jax.nn.log_softmax((theirs @ their_table.T)[..., :SHARED] / 1.5)
    ids = jnp.asarray(np.random.default_rng(1).permuted(np.tile(np.arange(SHARED), (B, T, 1)), axis=-1), jnp.int32)
    rows = ids, jnp.take_along_axis(logq, ids, axis=-1)

    def loss(hidden, table):
        options = dict(beta=beta, temperature=1.5, vocab=SHARED)
        return top_k_divergence(hidden, table, *rows, weight, rules(**sizes), **options)

    close(graded(loss, hidden, table), by_hand(beta, 1.5), rtol=1e-4, atol=1e-5)


def test_swapped_rows_are_noticed():
    """Two sequences' cached rows exchanged change the loss: nothing averages the teacher over places."""
    hidden, table, theirs, their_table, weight = arrays()
    logq = jax.nn.log_softmax(theirs @ their_table.T)[..., :V]
    logprobs, ids = jax.lax.top_k(logq, 4)
    run = lambda order: top_k_divergence(hidden, table, ids[order], logprobs[order], weight, rules())[0]  # noqa: E731
    order = jnp.arange(B)
    assert abs(float(run(order) - run(order.at[jnp.array([0, 1])].set(jnp.array([1, 0]))))) > 1e-2
