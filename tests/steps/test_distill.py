"""White-box distillation: TRL's generalised JSD, the Hinton mix, cached and several teachers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.reduce import weigh_tokens
from dqjax.steps.distill import CachedTeacher, DistillConfig, make_distill_loss
from tests.steps import tiny


def make_batch(seed=0, count=6, rows=None):
    made = tiny.sequences(seed, count)
    batch = tiny.pack([[tiny.tokens_of(ids, prompt)] for ids, prompt in made], rows=rows)
    return made, weigh_tokens(batch, "token_mean")


def trl_jsd(made, params, teacher, beta, temperature):
    """`GKDTrainer.generalized_jsd_loss` over the trained places of all sequences."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    leaves, fixed = tiny.torch_copy(params), tiny.torch_copy(teacher)
    student = torch.cat([tiny.torch_logits(leaves, ids)[:-1] for ids, _ in made])
    with torch.no_grad():
        theirs = torch.cat([tiny.torch_logits(fixed, ids)[:-1] for ids, _ in made])
    labels = torch.cat(
        [torch.where(torch.arange(1, len(ids)) >= prompt, torch.as_tensor(ids[1:]), -100) for ids, prompt in made]
    )
    loss = GKDTrainer.generalized_jsd_loss(student, theirs, labels=labels, beta=beta, temperature=temperature)
    loss.backward()
    return loss.item(), {name: x.grad.numpy() for name, x in leaves.items()}


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_divergence_equals_trl(beta, temperature):
    model = tiny.Bigram()
    params, teacher = model.init(1), model.init(2)
    made, batch = make_batch()
    want, want_grads = trl_jsd(made, params, teacher, beta, temperature)
    loss = make_distill_loss(model, tiny.one_device(), [model], beta=beta, temperature=temperature)
    grads, value, metrics = tiny.value_and_grad(loss, params, batch, {"teachers": (teacher,)})
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].total / metrics["loss"].count, want, rtol=1e-5)
    tiny.assert_trees_close(grads, want_grads)
