"""What the benchmark checks against is itself right: torch and TRL in float64 say the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.experimental.gkd import GKDTrainer

from dqjax.kernels import exact, vocabulary_peers


def test_attention_of_one_head():
    B, T, N, K, H, lengths = 2, 96, 6, 2, 16, [40, 1, 55]
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (B, T, N, H), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H), jnp.bfloat16) for key in keys[2:])
    ids = np.repeat([7, 2, 5], lengths)[None].repeat(B, axis=0)
    found = exact.attention_head(q, k, v, d_out, jnp.asarray(ids))
    tq, tk, tv, td = (
        torch.tensor(np.asarray(x[0], np.float64)) for x in (q[:, :, :3], k[:, :, :1], v[:, :, :1], d_out[:, :, :3])
    )
    for x in (tq, tk, tv):
        x.requires_grad_()
    see = torch.tensor((ids[0][:, None] == ids[0]) & (np.arange(T)[:, None] >= np.arange(T)))
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (tq, tk.expand(T, 3, H), tv.expand(T, 3, H))), attn_mask=see
    ).transpose(0, 1)
    gradients = torch.autograd.grad(out, (tq, tk, tv), td)
    want = {"out": out, "dq": gradients[0], "dk": gradients[1][:, 0], "dv": gradients[2][:, 0]}
    for name, x in want.items():
        np.testing.assert_allclose(found[name], x.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_decode_of_one_sequence():
    shapes = (2, 6, 16), (2, 50, 2, 16), (2, 50, 2, 16)
    q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    tq, tk, tv = (torch.tensor(np.asarray(x[:1], np.float64)) for x in (q[:, None], k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (tq, tk, tv)), enable_gqa=True)
    found = exact.decode_sequence(q, k, v)["out"]
    np.testing.assert_allclose(found, want[0, :, 0].numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["cross_entropy", "logprob", "jsd"])
def test_losses_of_a_few_rows(name):
    P, D, V, weight = 5, 8, 33, 1 / 20
    x, x_teacher, w = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(((P, D), (P, D), (V, D)))
    )
    labels = np.array([3, 0, 32, 7, 7])
    loss = vocabulary_peers.full_logits(jnp.asarray(labels), weight)[name]
    found = exact.vocabulary_rows(loss, x, w, *([x_teacher] if name == "jsd" else []))

    tx, tt, tw = (torch.tensor(np.asarray(a, np.float64)) for a in (x, x_teacher, w))
    logits = tx.requires_grad_() @ tw.T
    logp = torch.log_softmax(logits, -1)
    logprob = logp[torch.arange(P), torch.tensor(labels)]
    if name == "cross_entropy":
        value, per_row = -logprob.sum(), logprob
    elif name == "logprob":
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        value, per_row = (logprob + torch.logsumexp(logits, -1) + entropy).sum(), logprob
    else:
        terms = GKDTrainer.generalized_jsd_loss(logits[None], (tt @ tw.T)[None], beta=0.5, reduction="none")
        per_row = terms[0].sum(-1)
        value = per_row.sum()
    (dx,) = torch.autograd.grad(weight * value, tx)
    np.testing.assert_allclose(found["per_row"], per_row.detach().numpy(), rtol=1e-9)
    np.testing.assert_allclose(found["dx"], dx.numpy(), rtol=1e-9, atol=1e-12)
