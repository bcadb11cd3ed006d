"""The Hopper kernels on a CPU, by Pallas's interpreter: right outputs and gradients, and no barrier that waits for ever.

Skipped unless jax is 0.11.2 (Python 3.12 or newer), for which the interpreter is completed: some two minutes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.kernels.attention.api import attention, make_plan
from dqjax.kernels.linear_logprob.api import TeacherHead, linear_cross_entropy, linear_kl, linear_logprob
from tests.kernels.gpu_interpreter import interpreted_gpu, why_no_interpreter

pytestmark = pytest.mark.skipif(why_no_interpreter() is not None, reason=str(why_no_interpreter()))

LAYOUTS = {
    "straddling tiles": ((1, 512, 4, 2, 128), [[100, 37, 200, 91]], {}),
    "rows of unlike padding": ((2, 384, 2, 1, 64), [[150, 130, 50], [384]], {}),
    "odd group, odd length": ((1, 500, 3, 1, 128), [[120, 280, 60]], {}),
    "window": ((1, 640, 4, 1, 128), [[33, 64, 128, 1, 250, 100]], {"window": 130}),
    "not causal": ((1, 384, 2, 2, 128), [[200, 100]], {"causal": False}),
    "capped, short documents": ((1, 384, 4, 2, 64), [[60] * 6], {"softcap": 5.0}),
}


def off(got, want):
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(layout):
    (B, T, N, K, H), documents, options = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.bfloat16)  # noqa: E731
    q, d_out, k, v = map(draw, (N, N, K, K))
    segments = np.zeros((B, T), np.int32)
    for row, lengths in zip(segments, documents):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)

    def all_of(backend, q, k, v):
        shape = {name: options[name] for name in ("causal", "window") if name in options}
        plan = make_plan(jnp.asarray(segments), backend=backend, **shape) if backend == "mosaic_gpu" else None
        settings = {"q_segment_ids": jnp.asarray(segments), "backend": backend, "plan": plan}
        out, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, **settings, **options), q, k, v)
        return out, *pullback(d_out.astype(out.dtype))

    want = all_of("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    with interpreted_gpu():
        got = jax.jit(functools.partial(all_of, "mosaic_gpu"))(q, k, v)
    assert max(off(*pair) for pair in zip(got, want)) < 0.004
    padding = segments == 0
    assert not any(np.asarray(x)[padding].any() for x in got)


def test_a_chunk_of_a_prompt_attends_to_what_is_cached():
    """T is not S: new tokens at their positions, rows of unlike lengths, one without any."""
    B, T, S, N, K, H = 3, 100, 384, 4, 2, 128
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.normal(size=(B, S, K, H)), jnp.bfloat16) for _ in range(2))
    starts, counts = np.array([[200], [0], [0]]), np.array([[100], [70], [0]])
    place = np.arange(T)
    tokens = {
        "q_segment_ids": jnp.asarray(place < counts, jnp.int32),
        "kv_segment_ids": jnp.asarray(np.arange(S) < starts + counts, jnp.int32),
        "q_positions": jnp.asarray(starts + place, jnp.int32),
    }
    want = attention(*(x.astype(jnp.float32) for x in (q, k, v)), **tokens, backend="reference")
    with interpreted_gpu():
        plan = make_plan(**tokens, causal=True, backend="mosaic_gpu")
        got = jax.jit(lambda q, k, v: attention(q, k, v, **tokens, backend="mosaic_gpu", plan=plan))(q, k, v)
    assert off(got, want) < 0.004 and not np.asarray(got)[2].any()


@pytest.mark.parametrize("loss", ["cross_entropy", "logprob", "divergence"])
def test_vocabulary(loss):
    """Rows, columns and a vocabulary that fill no tile."""
    M, D, V, vocab = 150, 128, 576, 500
    rng = np.random.default_rng(1)
    x, teacher = (jnp.asarray(rng.normal(size=(M, D)), jnp.bfloat16) for _ in range(2))
    w = jnp.asarray(rng.normal(size=(V, D)) / 8, jnp.bfloat16)
    labels, weight = jnp.asarray(rng.integers(-1, vocab, M), jnp.int32), jnp.asarray(rng.random(M), jnp.float32)

    def total(backend, x, w):
        options = {"vocab": vocab, "temperature": 0.7, "backend": backend}
        if loss == "cross_entropy":
            return linear_cross_entropy(x, w, labels, weight, **options)[0]
        if loss == "divergence":
            head = TeacherHead(teacher.astype(w.dtype), jnp.asarray(w))
            return linear_kl(x, w, jax.lax.stop_gradient(head), weight, beta=0.4, **options)[0]
        logprob, lse, entropy = linear_logprob(x, w, labels, **options)
        return jnp.sum(weight * (logprob + 0.5 * lse - 0.3 * entropy))

    grade = jax.value_and_grad(total, argnums=(1, 2))
    value, wanted = grade("reference", x.astype(jnp.float32), w.astype(jnp.float32))
    with interpreted_gpu():
        got, gradients = jax.jit(functools.partial(grade, "mosaic_gpu"))(x, w)
    np.testing.assert_allclose(got, value, rtol=1e-4)
    assert max(off(*pair) for pair in zip(gradients, wanted)) < 0.006
