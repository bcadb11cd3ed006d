"""White-box distillation: TRL's generalised JSD, the Hinton mix, cached and several teachers."""

import dataclasses

import jax
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


def test_hinton_is_the_softened_kl_and_cross_entropy():
    """α T² KL + (1 − α) CE, both means over trained tokens, in torch."""
    import torch

    alpha, temperature, model = 0.3, 2.0, tiny.Bigram()
    params, teacher = model.init(1), model.init(2)
    made, batch = make_batch()
    kl, kl_grads = trl_jsd(made, params, teacher, 0.0, temperature)
    leaves = tiny.torch_copy(params)
    ce = -torch.cat([tiny.torch_logprobs(leaves, ids)[0][prompt - 1 :] for ids, prompt in made]).mean()
    ce.backward()
    loss = make_distill_loss(model, tiny.one_device(), [model], temperature=temperature, hinton=alpha)
    grads, value, metrics = tiny.value_and_grad(loss, params, batch, {"teachers": (teacher,)})
    scale = alpha * temperature**2
    np.testing.assert_allclose(value, scale * kl + (1 - alpha) * ce.item(), rtol=1e-5)
    want = {name: scale * kl_grads[name] + (1 - alpha) * x.grad.numpy() for name, x in leaves.items()}
    tiny.assert_trees_close(grads, want)
    np.testing.assert_allclose(metrics["cross_entropy"].total / metrics["cross_entropy"].count, ce.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"].total / metrics["loss"].count, kl, rtol=1e-5)


def with_rows(batch, made, teacher, k, *, swap=False, temperature=1.0):
    """The batch with the teacher's k best tokens at every place, as a cache keyed by sequence gives them."""
    ids, logprobs = [], []
    for sequence, _ in made:
        logp = jax.nn.log_softmax(tiny.torch_logits(tiny.torch_copy(teacher), sequence).detach().numpy() / temperature)
        best, where = jax.lax.top_k(logp, k)
        ids.append(np.asarray(where, np.int32))
        logprobs.append(np.asarray(best))
    if swap:  # the longest two, so that every place of the shorter still finds a row
        a, b = sorted(range(len(made)), key=lambda i: len(made[i][0]))[-2:]
        n = len(made[a][0])
        for rows in (ids, logprobs):
            rows[a], rows[b] = rows[b][:n], np.concatenate([rows[a], rows[b][n:]])
    side = {"teacher_ids": tiny.by_token(batch, ids), "teacher_logprobs": tiny.by_token(batch, logprobs)}
    return dataclasses.replace(batch, side={**batch.side, **side})


def make_keyed_batch():
    made = tiny.sequences(0, 6)
    batch = tiny.pack([[tiny.tokens_of(ids, prompt, {"row": i})] for i, (ids, prompt) in enumerate(made)])
    return made, weigh_tokens(batch, "token_mean")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_cache_of_all_tokens_is_the_online_teacher(beta):
    model = tiny.Bigram()
    params, teacher = model.init(1), model.init(2)
    made, batch = make_keyed_batch()
    online = make_distill_loss(model, tiny.one_device(), [model], beta=beta, temperature=1.5)
    cached = make_distill_loss(model, tiny.one_device(), [CachedTeacher()], beta=beta, temperature=1.5)
    want = tiny.value_and_grad(online, params, batch, {"teachers": (teacher,)})
    rows = with_rows(batch, made, teacher, tiny.VOCAB, temperature=1.5)
    tiny.assert_trees_close(tiny.value_and_grad(cached, params, rows), want, rtol=1e-4, atol=1e-5)
    swapped = with_rows(batch, made, teacher, tiny.VOCAB, swap=True, temperature=1.5)
    assert abs(tiny.value_and_grad(cached, params, swapped)[1] - want[1]) > 1e-3


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_few_tokens_bound_or_change_the_divergence(tail):
    """A bucket loses information, so its KL lies under the whole one; renormalising is another teacher."""
    model = tiny.Bigram()
    params, teacher = model.init(1), model.init(2)
    made, batch = make_keyed_batch()
    whole = trl_jsd(made, params, teacher, 0.0, 1.0)[0]
    loss = make_distill_loss(model, tiny.one_device(), [CachedTeacher(tail=tail)])
    values = [float(tiny.value_and_grad(loss, params, with_rows(batch, made, teacher, k))[1]) for k in (2, 8, 20)]
    if tail == "bucket":
        assert 0 < values[0] < values[1] < values[2] < whole + 1e-5
    np.testing.assert_allclose(values[2], whole, rtol=0.02)


def test_several_teachers_are_weighed():
    model = tiny.Bigram()
    params, teachers = model.init(1), (model.init(2), model.init(3))
    made, batch = make_batch()
    loss = make_distill_loss(model, tiny.one_device(), [model, model], weights=(0.25, 0.75), beta=0.5)
    _, value, metrics = tiny.value_and_grad(loss, params, batch, {"teachers": teachers})
    parts = [trl_jsd(made, params, teacher, 0.5, 1.0)[0] for teacher in teachers]
    np.testing.assert_allclose(value, 0.25 * parts[0] + 0.75 * parts[1], rtol=1e-5)
    seen = [float(metrics[f"divergence_{i}"].total / metrics[f"divergence_{i}"].count) for i in (0, 1)]
    np.testing.assert_allclose(seen, parts, rtol=1e-5)


def test_a_teacher_of_its_own_shape():
    """A wider teacher with a longer table: only shared tokens count, and it gets no gradient."""
    model, other = tiny.Bigram(), tiny.Bigram(rows=tiny.VOCAB + 5)
    params, teacher = model.init(1), other.init(2)
    _, batch = make_batch()
    loss = make_distill_loss(model, tiny.one_device(), [other], vocab=tiny.VOCAB)
    _, value, _ = tiny.value_and_grad(loss, params, batch, {"teachers": (teacher,)})
    cut = {**teacher, "table": teacher["table"][: tiny.VOCAB]}
    same = make_distill_loss(model, tiny.one_device(), [model])
    np.testing.assert_allclose(value, tiny.value_and_grad(same, params, batch, {"teachers": (cut,)})[1], rtol=1e-5)
    of_teacher = jax.grad(lambda frozen: loss(params, frozen, tiny.on_device(batch), jax.random.key(0))[0])
    grads = of_teacher({"teachers": (teacher,)})
    assert all(not g.any() for g in jax.tree.leaves(grads))


def test_config():
    assert DistillConfig(teachers=["t"]).divergence() == DistillConfig(teachers=["t"], loss="hinton").divergence() == 0.0
    assert DistillConfig(teachers=["t"], loss="reverse_kl").divergence() == 1.0
    assert DistillConfig(teachers=["t"], loss="jsd", beta=0.3).divergence() == 0.3
    with pytest.raises(ValueError, match="weights that sum to 1"):
        DistillConfig(teachers=["t", {"cache": "c", "weight": 0.5}])
    with pytest.raises(ValueError, match="one of model, cache; got both"):
        DistillConfig(teachers=[{"model": "t", "cache": "c"}])
    with pytest.raises(ValueError, match="infinite"):
        DistillConfig(loss="reverse_kl", teachers=[{"cache": "c"}], tail="renormalise")
    with pytest.raises(ValueError, match="a cache holds nothing of what the student will say"):
        DistillConfig(teachers=[{"cache": "c"}], on_policy={})
    with pytest.raises(ValueError, match="its own samples"):
        DistillConfig(teachers=["t"], loss="hinton", on_policy={})
    with pytest.raises(ValueError, match="one weight for each of 2 teachers"):
        make_distill_loss(tiny.Bigram(), tiny.one_device(), [CachedTeacher(), CachedTeacher()])


def test_teachers_without_parameters_are_refused():
    loss = make_distill_loss(tiny.Bigram(), tiny.one_device(), [tiny.Bigram()])
    with pytest.raises(ValueError, match="1 teachers are models, frozen..teachers.. holds parameters for 0"):
        loss(tiny.Bigram().init(1), None, tiny.on_device(make_batch()[1]), jax.random.key(0))
