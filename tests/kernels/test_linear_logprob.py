"""linear_logprob, linear_cross_entropy and linear_kl against float64 full logits, optax, torch and TRL."""

import functools
import itertools
import logging
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dqjax.kernels.linear_logprob import (
    api,
    mosaic_gpu,
    mosaic_gpu_logprob,
    mosaic_gpu_loss,
    over_rows,
    over_vocabulary,
)
from dqjax.kernels.linear_logprob.api import TeacherHead, TopK, linear_cross_entropy, linear_kl, linear_logprob
from dqjax.kernels.linear_logprob.head import MASKED

BACKENDS = ["reference", "xla", "xla in chunks", "mosaic_gpu emulated"]
M, D, V, VOCAB = 70, 16, 200, 187


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The backend's name; "in chunks" makes the tiles so small that every loop and its tail run."""
    if request.param == "xla in chunks":
        small_tiles(monkeypatch)
    if request.param == "mosaic_gpu emulated":
        emulate_mosaic_gpu(monkeypatch)
    return request.param.split()[0]


of_lists = pytest.mark.parametrize("backend", BACKENDS[:3], indirect=True)


def small_tiles(monkeypatch):
    monkeypatch.setattr(over_rows, "TILE", 1)
    monkeypatch.setattr(over_rows, "LEAST_ROWS", 16)
    monkeypatch.setattr(over_vocabulary, "TILE", 1)
    monkeypatch.setattr(over_vocabulary, "LEAST_COLUMNS", 64)
    monkeypatch.setattr(over_vocabulary, "KEEP", 0)


def emulate_mosaic_gpu(monkeypatch):
    """XLA in place of the four Hopper kernels, with small tiles: for what is built on them."""

    def masked(x, w, limit, temperature):
        z = jnp.einsum("MD,VD->MV", x, w, preferred_element_type=jnp.float32) / temperature
        return jnp.where(jnp.arange(len(w)) < limit, z, MASKED)

    def tiles(z):
        return [z[:, c : c + mosaic_gpu.COLUMNS] for c in range(0, z.shape[1], mosaic_gpu.COLUMNS)]

    def logits(x, w, limit, temperature):
        z = masked(x, w, limit, temperature)
        return z, *statistics(x, w, limit, temperature)[:2]

    def statistics(x, w, limit, temperature):
        z = tiles(masked(x, w, limit, temperature))
        peaks = jnp.stack([tile.max(axis=1) for tile in z])
        below = [tile - peak[:, None] for tile, peak in zip(z, peaks)]
        s = jnp.stack([jnp.exp(tile).sum(axis=1) for tile in below])
        return peaks, s, jnp.stack([(jnp.exp(tile) * tile).sum(axis=1) for tile in below])

    def exponentials(x, w, limit, anchor, temperature):
        e = jnp.exp(masked(x, w, limit, temperature) - anchor[:, None])
        return e.astype(x.dtype), jnp.stack([tile.sum(axis=1) for tile in tiles(e)])

    def gradient(x, w, limit, lse, alpha, gamma, temperature):
        logp = masked(x, w, limit, temperature) - lse[:, None]
        return (jnp.exp(logp) * (alpha[:, None] - gamma[:, None] * logp)).astype(x.dtype)

    small_tiles(monkeypatch)
    monkeypatch.setattr(mosaic_gpu_loss, "TILE", 1)
    monkeypatch.setattr(mosaic_gpu_logprob, "TILE", 1)
    monkeypatch.setattr(mosaic_gpu, "TALL", 8)
    monkeypatch.setattr(mosaic_gpu, "COLUMNS", 64)
    monkeypatch.setattr(api, "why_not_mosaic_gpu", lambda w, varying: None)
    for kernel in (logits, statistics, exponentials, gradient):
        monkeypatch.setattr(mosaic_gpu, kernel.__name__, kernel)


def normal(rng, *shape, dtype="float32"):
    return jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(dtype)))


def inputs(seed=0, dtype="float32", spread=1.0, ignored=0.2):
    """x, w, labels (some negative) and weights (some 0)."""
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(M) < ignored, -1, rng.integers(0, VOCAB, M)).astype(np.int32)
    weight = (rng.random(M) * (rng.random(M) > ignored)).astype(np.float32)
    x, w = normal(rng, M, D, dtype=dtype), normal(rng, V, D, dtype=dtype)
    return x * jnp.asarray(spread, x.dtype), w, jnp.asarray(labels), jnp.asarray(weight)


def in_float64(f, *arrays):
    """f with its gradients in float64, of the arrays' values."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in arrays]
        value, grads = jax.jit(jax.value_and_grad(f, argnums=tuple(range(len(arrays)))))(*wide)
        return float(value), [np.asarray(g) for g in grads]


def close(got, ref, bound):
    """Relative distance of the whole array within the bound, and zeros where the reference has them."""
    got, ref = (np.asarray(a, np.float64) for a in (got, ref))
    assert not got[ref == 0].any(), "not zero where it must be"
    assert np.linalg.norm(got - ref) <= bound * np.linalg.norm(ref)


def check(f, f64, x, w, bound):
    """Value and gradients of f(x, w) against f64's, by relative norms."""
    (value, _), grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(x, w)
    want, want_grads = in_float64(f64, x, w)
    np.testing.assert_allclose(value, want, rtol=bound, atol=bound)
    for name, got, ref, like in zip(("dx", "dw"), grads, want_grads, (x, w)):
        assert got.dtype == like.dtype, name
        close(got, ref, bound)


BOUND = {"float32": 2.0**-17, "bfloat16": 2.0**-7}


def log_softmax(x, w, temperature=1.0, vocab=VOCAB):
    return jax.nn.log_softmax((x @ w[:vocab].T) / temperature)


# linear_logprob


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprob_lse_entropy_and_any_cotangent(backend, dtype, temperature):
    def results(x, w, labels):
        return linear_logprob(x, w, labels, vocab=VOCAB, temperature=temperature, backend=backend)

    def results64(x, w, labels):
        z = x @ w[:VOCAB].T / temperature
        logp = jax.nn.log_softmax(z)
        logprob = jnp.take_along_axis(logp, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=1)
        return tuple(jnp.where(labels >= 0, y, 0) for y in (logprob, jax.nn.logsumexp(z, axis=1), entropy))

    def graded(f):
        @jax.jit
        def run(x, w, labels, cotangents):
            values, pullback = jax.vjp(lambda x, w: f(x, w, labels), x, w)
            return values, pullback(cotangents)

        return run

    ours, oracle = graded(results), graded(results64)

    @hypothesis.settings(max_examples=5, derandomize=True, deadline=None, database=None)
    @hypothesis.given(seed=st.integers(0, 2**31))
    def compare(seed):
        x, w, labels, _ = inputs(seed, dtype)
        cotangents = tuple(np.random.default_rng(seed).normal(size=(3, M)).astype(np.float32))
        got = ours(x, w, labels, cotangents)
        with jax.enable_x64(True):
            wide = [np.asarray(a, np.float64) for a in (x, w)]
            want = oracle(*wide, np.asarray(labels), tuple(np.float64(c) for c in cotangents))
        assert all(y.dtype == jnp.float32 and not y[labels < 0].any() for y in got[0])
        for y, ref in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
            close(y, ref, BOUND[dtype])

    compare()


def test_extreme_logits(backend):
    """Logits of ±1e4: one-hot rows, entropy 0, no overflow."""
    x, w, labels, _ = inputs(1, spread=1e3)
    logprob, lse, entropy = linear_logprob(x, w, labels, backend=backend)
    z = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    kept = np.asarray(labels) >= 0
    np.testing.assert_allclose(lse[kept], z.max(1)[kept], rtol=1e-5)
    np.testing.assert_allclose(logprob[kept], (z[np.arange(M), labels] - z.max(1))[kept], rtol=1e-4, atol=1e-2)
    assert np.isfinite(entropy).all() and (entropy >= 0).all()


def test_one_entry_vocabulary(backend):
    x, w, labels, _ = inputs(2)
    logprob, _, entropy = linear_logprob(x, w, jnp.where(labels >= 0, 0, -1), vocab=1, backend=backend)
    np.testing.assert_allclose(logprob, 0, atol=1e-6)
    np.testing.assert_allclose(entropy, 0, atol=1e-6)


def test_logprob_is_torchs(backend):
    """Gradients too, through a policy-gradient loss with an entropy bonus."""
    torch = pytest.importorskip("torch")
    x, w, labels, weight = inputs(3, ignored=0.0)

    def loss(x, w):
        logprob, _, entropy = linear_logprob(x, w, labels, temperature=0.9, backend=backend)
        return jnp.sum(weight * (-jnp.exp(logprob) + 0.1 * entropy))

    got = jax.value_and_grad(loss, argnums=(0, 1))(x, w)
    tx, tw = (torch.tensor(np.asarray(a), requires_grad=True) for a in (x, w))
    logp = torch.log_softmax(tx @ tw.T / 0.9, dim=-1)
    logprob = logp.gather(1, torch.tensor(np.asarray(labels), dtype=torch.int64)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    want = (torch.tensor(np.asarray(weight)) * (-logprob.exp() + 0.1 * entropy)).sum()
    want.backward()
    np.testing.assert_allclose(got[0], want.item(), rtol=1e-4)
    for ours, theirs in zip(got[1], (tx.grad, tw.grad)):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


# linear_cross_entropy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_cross_entropy(backend, dtype, z_loss):
    x, w, labels, weight = inputs(4, dtype)

    def total64(x, w):
        z = x @ w[:VOCAB].T / 0.7
        loss = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(labels, 0))
        loss += z_loss * jax.nn.logsumexp(z, axis=1) ** 2
        return 3 * jnp.sum(jnp.where(labels >= 0, weight, 0) * loss)

    def total(x, w):
        loss, logprob = linear_cross_entropy(
            x, w, labels, weight, vocab=VOCAB, temperature=0.7, z_loss=z_loss, backend=backend
        )
        return 3 * loss, logprob

    check(total, total64, x, w, BOUND[dtype])
    logprob = jax.jit(total)(x, w)[1]
    want, _, _ = linear_logprob(x, w, labels, vocab=VOCAB, temperature=0.7, backend="reference")
    kept = (labels >= 0) & (weight != 0)
    np.testing.assert_allclose(logprob, jnp.where(kept, want, 0), atol=1e-4)


def test_rows_without_weight_reach_nothing(backend):
    """inf and NaN in rows of weight 0, or with a negative label, change no bit; in a weighted row they stay visible."""
    x, w, labels, weight = inputs(5)
    off = (weight == 0) | (labels < 0)
    off_label = labels < 0

    def graded(x):
        value, grads = jax.value_and_grad(
            lambda x, w: linear_cross_entropy(x, w, labels, weight, backend=backend)[0], argnums=(0, 1)
        )(x, w)
        return value, grads

    clean, dirty = graded(x), graded(jnp.where(off[:, None], jnp.inf, x))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert not clean[1][0][off].any()
    assert jnp.isnan(graded(x.at[int(jnp.argmax(~off))].set(jnp.nan))[0])

    def of_logprob(x):
        return jax.grad(lambda w: sum(map(jnp.sum, linear_logprob(x, w, labels, backend=backend))))(w)

    np.testing.assert_array_equal(of_logprob(x), of_logprob(jnp.where(off_label[:, None], jnp.inf, x)))


def test_gradients_of_labels_without_any_probability(backend):
    """Losses of hundreds of nats, beyond what one exponential can span."""
    x, w, labels, weight = inputs(16)

    def total(x, w):
        return linear_cross_entropy(40 * x, w, labels, weight, z_loss=1e-3, backend=backend)[0]

    def total64(x, w):
        z = 40 * x @ w.T
        loss = optax.softmax_cross_entropy_with_integer_labels(z, jnp.maximum(labels, 0))
        return jnp.sum(jnp.where(labels >= 0, weight, 0) * (loss + 1e-3 * jax.nn.logsumexp(z, axis=1) ** 2))

    assert float(jnp.max(-linear_logprob(40 * x, w, labels)[0])) > 2 * mosaic_gpu_loss.MARGIN
    got, want = jax.grad(total, argnums=(0, 1))(x, w), jax.grad(total64, argnums=(0, 1))(x, w)
    for ours, theirs in zip(got, want):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(theirs))))


def test_no_weight_at_all(backend):
    x, w, labels, weight = inputs(6)
    loss, grads = jax.value_and_grad(
        lambda x, w: linear_cross_entropy(x, w, labels, 0 * weight, backend=backend)[0], argnums=(0, 1)
    )(x, w)
    assert loss == 0 and not grads[0].any() and not grads[1].any()


def test_logprob_and_weight_carry_no_gradient(backend):
    x, w, labels, weight = inputs(7)
    of_aux = jax.grad(lambda x: jnp.sum(linear_cross_entropy(x, w, labels, weight, backend=backend)[1]))(x)
    of_weight = jax.grad(lambda weight: linear_cross_entropy(x, w, labels, weight, backend=backend)[0])(weight)
    assert not of_aux.any() and not of_weight.any()


# linear_kl


def divergence64(logp, logq, beta):
    """The generalised Jensen-Shannon divergence of each row, as GKD writes it."""
    p, q = jnp.exp(logp), jnp.exp(logq)
    if beta in (0.0, 1.0):
        return jnp.sum(q * (logq - logp) if beta == 0 else p * (logp - logq), axis=1)
    logm = jnp.log((1 - beta) * p + beta * q)
    return jnp.sum(beta * q * (logq - logm) + (1 - beta) * p * (logp - logm), axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_from_a_head_of_another_width(backend, dtype, beta):
    x, w, _, weight = inputs(8, dtype)
    rng = np.random.default_rng(8)
    teacher = TeacherHead(normal(rng, M, 24, dtype=dtype), normal(rng, V + 13, 24, dtype=dtype))

    def total(x, w):
        return linear_kl(x, w, teacher, weight, beta=beta, vocab=VOCAB, temperature=1.3, backend=backend)

    xt, wt = (np.asarray(a, np.float64) for a in teacher)

    def total64(x, w):
        logp, logq = log_softmax(x, w, 1.3), log_softmax(jnp.asarray(xt), jnp.asarray(wt), 1.3)
        return jnp.sum(weight * divergence64(logp, logq, beta))

    check(total, total64, x, w, BOUND[dtype])
    assert not jax.jit(total)(x, w)[1][weight == 0].any()


def top_k(seed, k=6):
    rng = np.random.default_rng(seed)
    logq = jax.nn.log_softmax(2 * normal(rng, M, VOCAB))
    logprobs, ids = jax.lax.top_k(logq, k)
    return TopK(ids.at[3, 4:].set(-1), logprobs)


@of_lists
@pytest.mark.parametrize(
    "tail, beta",
    [("bucket", 0.0), ("bucket", 0.4), ("bucket", 1.0), ("renormalise", 0.0), ("renormalise", 0.4)],
)
def test_divergence_from_the_teachers_best_tokens(backend, tail, beta):
    x, w, _, weight = inputs(9)
    teacher = top_k(9)

    def total(x, w):
        return linear_kl(x, w, teacher, weight, beta=beta, tail=tail, vocab=VOCAB, backend=backend)

    ids, logq = (np.asarray(a) for a in teacher)
    q = np.where(ids >= 0, np.exp(np.float64(logq)), 0)
    q_tail = 1 - q.sum(1, keepdims=True)
    if tail == "renormalise":
        q, q_tail = q / q.sum(1, keepdims=True), 0 * q_tail
    q = np.concatenate([q, q_tail], axis=1)

    def total64(x, w):
        p = jnp.where(ids >= 0, jnp.take_along_axis(jnp.exp(log_softmax(x, w)), np.maximum(ids, 0), axis=1), 0)
        p = jnp.concatenate([p, 1 - p.sum(1, keepdims=True)], axis=1)
        m = q if beta == 1 else p if beta == 0 else (1 - beta) * p + beta * q
        of_p, of_q = (jnp.sum(jnp.where(a > 0, a * jnp.log(jnp.where(a > 0, a / m, 1)), 0), axis=1) for a in (p, q))
        return jnp.sum(weight * (of_q if beta == 0 else of_p if beta == 1 else beta * of_q + (1 - beta) * of_p))

    check(total, total64, x, w, 2.0**-15)


@of_lists
def test_all_tokens_in_the_list_is_the_whole_divergence(backend):
    """k = V leaves nothing in the bucket: the full-head divergence."""
    x, w, _, weight = inputs(10)
    rng = np.random.default_rng(10)
    head = TeacherHead(normal(rng, M, D), normal(rng, V, D))
    logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(head.x @ head.w.T), V)
    for beta in (0.0, 0.5):
        whole = linear_kl(x, w, head, weight, beta=beta, backend=backend)[0]
        listed = linear_kl(x, w, TopK(ids, logprobs), weight, beta=beta, tail="renormalise", backend=backend)[0]
        np.testing.assert_allclose(listed, whole, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergence_is_trls(backend, beta):
    """GKDTrainer.generalized_jsd_loss: value and gradient, with its temperature and batchmean over valid tokens."""
    torch = pytest.importorskip("torch")
    gkd = pytest.importorskip("trl.experimental.gkd")
    x, w, labels, _ = inputs(11)
    rng = np.random.default_rng(11)
    teacher = TeacherHead(normal(rng, M, D), normal(rng, V, D))
    valid = np.asarray(labels) >= 0
    weight = jnp.asarray(valid / valid.sum(), jnp.float32)
    got, grads = jax.value_and_grad(
        lambda x, w: linear_kl(x, w, teacher, weight, beta=beta, temperature=0.8, backend=backend)[0], argnums=(0, 1)
    )(x, w)
    tx, tw = (torch.tensor(np.asarray(a), requires_grad=True) for a in (x, w))
    target = torch.tensor(np.asarray(teacher.x @ teacher.w.T))
    marks = torch.tensor(np.where(valid, np.asarray(labels), -100))
    want = gkd.GKDTrainer.generalized_jsd_loss(
        (tx @ tw.T)[None], target[None], labels=marks[None], beta=beta, temperature=0.8
    )
    want.backward()
    np.testing.assert_allclose(got, want.item(), rtol=1e-4)
    for ours, theirs in zip(grads, (tx.grad, tw.grad)):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


# On a mesh


def make_mesh():
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def losses(axis_name):
    """Every function of the module as (x, w, labels, weight, teacher parts) -> local sum."""

    def logprob(x, w, labels, weight, xt, wt, logq):
        a, b, c = linear_logprob(x, w, labels, vocab=VOCAB, temperature=0.7, axis_name=axis_name)
        return jnp.sum(weight * (a + 0.5 * b - 0.2 * c))

    def cross_entropy(x, w, labels, weight, xt, wt, logq):
        return linear_cross_entropy(x, w, labels, weight, vocab=VOCAB, z_loss=0.1, axis_name=axis_name)[0]

    def kl(x, w, labels, weight, xt, wt, logq):
        return linear_kl(x, w, TeacherHead(xt, wt), weight, beta=0.3, vocab=VOCAB, axis_name=axis_name)[0]

    def top(x, w, labels, weight, xt, wt, logq):
        return linear_kl(x, w, TopK(*logq), weight, beta=0.6, vocab=VOCAB, axis_name=axis_name)[0]

    return {"logprob": logprob, "cross_entropy": cross_entropy, "kl": kl, "top_k": top}


ON_A_MESH = [
    *itertools.product(("xla", "xla in chunks"), ("logprob", "cross_entropy", "kl", "top_k")),
    *itertools.product(("mosaic_gpu emulated",), ("logprob", "cross_entropy")),
]


@pytest.mark.parametrize("backend, name", ON_A_MESH, indirect=["backend"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_vocabulary_split_over_a_mesh_axis(backend, name, check_vma, monkeypatch):
    """Rows over data, table over tensor: loss and gradients of one device, in both modes of shard_map."""
    monkeypatch.setattr(api, "default_backend", lambda device, refusal: backend)
    x, w, labels, weight = (a[:64] if len(a) == M else a for a in inputs(12))
    rng = np.random.default_rng(12)
    teacher = jax.tree.map(lambda a: a[:64], top_k(12))
    operands = (x, w, labels, weight, normal(rng, 64, 24), normal(rng, V, 24), tuple(teacher))
    rows, table = P("data"), P("tensor")
    specs = rows, table, rows, rows, rows, table, (rows, rows)

    def summed(*operands):
        return jax.lax.psum(losses("tensor")[name](*operands), "data")

    sharded = jax.shard_map(summed, mesh=make_mesh(), in_specs=specs, out_specs=P(), check_vma=check_vma)
    got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(*operands)
    want = jax.jit(jax.value_and_grad(losses(None)[name], argnums=(0, 1)))(*operands)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want)


def test_gradients_taken_inside_shard_map():
    """check_vma=True: value_and_grad in the body gives the same as outside."""
    x, w, labels, weight = (a[:64] if len(a) == M else a for a in inputs(13))

    def body(x, w, labels, weight):
        def loss(x, w):
            return jax.lax.psum(linear_cross_entropy(x, w, labels, weight, axis_name="tensor")[0], "data")

        return jax.grad(loss, argnums=(0, 1))(x, w)

    specs = P("data"), P("tensor"), P("data"), P("data")
    got = jax.jit(jax.shard_map(body, mesh=make_mesh(), in_specs=specs, out_specs=specs[:2]))(x, w, labels, weight)
    want = jax.grad(lambda x, w: linear_cross_entropy(x, w, labels, weight)[0], argnums=(0, 1))(x, w)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


@pytest.mark.parametrize("name", ["logprob", "cross_entropy", "kl"])
def test_a_split_batch_is_not_gathered_under_plain_jit(name, monkeypatch):
    """Chunks run along the vocabulary, or take some rows of every device."""
    small_tiles(monkeypatch)
    monkeypatch.setattr(over_rows, "LEAST_ROWS", 64)  # parts of 16 rows for 8 devices
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def shape(*dims, dtype=jnp.float32, at=split):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=at)

    operands = (
        shape(512, D),
        shape(V, D, at=whole),
        shape(512, dtype=jnp.int32),
        shape(512),
        shape(512, 24),
        shape(V, 24, at=whole),
        None,
    )
    grade = jax.jit(jax.grad(losses(None)[name], argnums=(0, 1)), out_shardings=(split, whole))
    text = grade.lower(*operands).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text and "collective-permute" not in text


# Memory and shape of the compiled program


def compiled(f, m, v, d=32):
    shapes = (
        jax.ShapeDtypeStruct((m, d), jnp.float32),
        jax.ShapeDtypeStruct((v, d), jnp.float32),
        jax.ShapeDtypeStruct((m,), jnp.int32),
        jax.ShapeDtypeStruct((m,), jnp.float32),
    )
    return jax.jit(jax.grad(f, argnums=(0, 1))).lower(*shapes).compile()


FUNCTIONS = {
    "logprob": lambda x, w, labels, weight: jnp.sum(weight * sum(linear_logprob(x, w, labels))),
    "cross_entropy": lambda x, w, labels, weight: linear_cross_entropy(x, w, labels, weight)[0],
    "kl": lambda x, w, labels, weight: linear_kl(x, w, TeacherHead(2 * x, 3 * w), weight, beta=0.5)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_logits_never_exist(name):
    """16384 × 50304 logits would be 3.3 GB; the temporaries of forward and backward stay under a fifth of that."""
    m, v = 16384, 50304
    assert compiled(FUNCTIONS[name], m, v).memory_analysis().temp_size_in_bytes < m * v * 4 / 5


@pytest.mark.parametrize("name", FUNCTIONS)
def test_small_problems_run_without_a_loop(name):
    assert "while" not in compiled(FUNCTIONS[name], 1024, 340).as_text()


# Errors and choice


def test_bad_arguments_say_what_was_expected():
    x, w, labels, weight = inputs(14)
    teacher = TeacherHead(x, w)
    with pytest.raises(ValueError, match="of one dtype"):
        linear_logprob(x, w.astype(jnp.bfloat16), labels)
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprob(x, w, labels, temperature=0.0)
    with pytest.raises(ValueError, match="number of real tokens"):
        linear_logprob(x, w, labels, vocab=V + 1)
    with pytest.raises(ValueError, match="beta goes from 0"):
        linear_kl(x, w, teacher, weight, beta=1.5)
    with pytest.raises(ValueError, match="is infinite"):
        linear_kl(x, w, top_k(0), weight, beta=1.0, tail="renormalise")
    with pytest.raises(ValueError, match="pass vocab"):
        linear_kl(x, w, TeacherHead(x, w[:-1]), weight)
    with pytest.raises(ValueError, match="unknown backend 'liger'"):
        linear_logprob(x, w, labels, backend="liger")
    with pytest.raises(NotImplementedError, match="whole vocabulary"):
        linear_logprob(x, w, labels, axis_name="tensor", backend="reference")


def test_what_the_hopper_kernels_refuse():
    x, w, labels, weight = inputs(14)
    with pytest.raises(NotImplementedError, match="cannot do .*use 'xla'"):
        linear_logprob(x, w, labels, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="cannot do .*use 'xla'"):
        linear_kl(x, w, TeacherHead(x, w), weight, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="cannot do a teacher's top k alone"):
        linear_kl(x, w, top_k(0), weight, backend="mosaic_gpu")


def test_the_default_is_the_hopper_kernel_where_it_can():
    hopper = types.SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200")
    ampere = types.SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="NVIDIA A100")
    assert api.default_backend(hopper, None) == "mosaic_gpu"
    assert api.default_backend(hopper, "float32") == api.default_backend(ampere, None) == "xla"


def test_the_choice_of_backend_is_logged_once(caplog):
    api._log.cache_clear()
    x, w, labels, _ = inputs(15)
    with caplog.at_level(logging.INFO, logger=api.__name__):
        linear_logprob(x, w, labels)
        linear_logprob(x, w, labels)
    assert [r.getMessage() for r in caplog.records] == ["linear_logprob: backend 'xla' on cpu"]
