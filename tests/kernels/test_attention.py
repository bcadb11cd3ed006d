"""Every attention backend against float64 numpy: output, lse and the three gradients.

The bound: the error may be 1.5 times that of the naive XLA path that rounds its probabilities to the inputs' dtype, plus
a rounding; no single row may stray much further; and zeros are zeros.
"""

import contextlib
import functools
import logging
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from dqjax.kernels.attention import api
from dqjax.kernels.attention.api import MASKED, attention, make_plan
from dqjax.kernels.attention.mask import Tokens, visible

BACKENDS = ["reference", "xla", "tpu"]
SLACK = {"bfloat16": 2.0**-10, "float32": 2.0**-19}


# The oracle


def oracle(q, k, v, segments, positions, d_out, d_lse, *, causal=True, window=None, softcap=None, scale=None):
    """Output, lse, dq, dk, dv in float64, from the formulas, one batch row and head at a time."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    (B, T, N, H), K = q.shape, k.shape[2]
    scale = H**-0.5 if scale is None else scale
    out, lse = np.zeros_like(q), np.full((B, T, N), MASKED)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b in range(B):
        qs, ks = np.asarray(segments[0][b])[:, None], np.asarray(segments[1][b])[None]
        distance = np.asarray(positions[0][b])[:, None] - np.asarray(positions[1][b])[None]
        see = (qs == ks) & (qs != 0)
        if causal:
            see &= distance >= 0
        if window is not None:
            see &= (distance if causal else abs(distance)) < window
        rows = see.any(1)
        for n in range(N):
            m = n // (N // K)
            raw = scale * q[b, :, n] @ k[b, :, m].T
            logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
            slope = 1 if softcap is None else 1 - (logits / softcap) ** 2
            logits = np.where(see, logits, -np.inf)[rows]
            peak = logits.max(1, keepdims=True)
            p = np.zeros(see.shape)
            p[rows] = np.exp(logits - peak)
            total = p[rows].sum(1, keepdims=True)
            lse[b, rows, n] = (peak + np.log(total))[:, 0]
            p[rows] /= total
            out[b, :, n] = p @ v[b, :, m]
            dv[b, :, m] += p.T @ d_out[b, :, n]
            d_weights = d_out[b, :, n] @ v[b, :, m].T
            delta = (d_out[b, :, n] * out[b, :, n]).sum(1) - d_lse[b, :, n]
            d_logits = p * (d_weights - delta[:, None]) * slope * scale
            dq[b, :, n] = d_logits @ k[b, :, m]
            dk[b, :, m] += d_logits.T @ q[b, :, n]
    return out, lse, dq, dk, dv


def naive(q, k, v, see, *, softcap=None, scale=None):
    """The yardstick: float32 logits and softmax, probabilities rounded to the inputs' dtype, gradients by JAX."""
    B, T, N, H = q.shape
    K = k.shape[2]
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(B, T, K, -1, H), k, preferred_element_type=jnp.float32)
    logits = logits * (H**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    see = see[:, None, None]
    p = jnp.where(see, jax.nn.softmax(jnp.where(see, logits, MASKED), axis=-1), 0).astype(q.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", p, v, preferred_element_type=jnp.float32).reshape(q.shape).astype(q.dtype)


@functools.lru_cache(maxsize=None)
def naive_graded(options):
    """A jitted (out, dq, dk, dv) of the yardstick."""
    options = dict(options)
    mask = options.pop("causal", True), options.pop("window", None)

    @jax.jit
    def run(q, k, v, segments, positions, d_out):
        see = visible(Tokens(*segments, *positions), *mask)
        out, pullback = jax.vjp(lambda q, k, v: naive(q, k, v, see, **options), q, k, v)
        return out, *pullback(d_out)

    return run


def relative(x, ref):
    """Relative distance of the whole tensor, and that of the worst row against the mean row."""
    error = np.asarray(x, np.float64) - ref
    scale = np.linalg.norm(ref) or 1.0
    rows = np.linalg.norm(error.reshape(-1, ref.shape[-1]), axis=1)
    return np.linalg.norm(error) / scale, rows.max() / (scale / np.sqrt(len(rows)))


# Running a backend


@functools.lru_cache(maxsize=None)
def graded(backend, blocks, options):
    """A jitted (out, lse, dq, dk, dv) of one backend."""
    options = dict(options)

    @jax.jit
    def run(q, k, v, segments, positions, d_out, d_lse):
        def call(q, k, v):
            mask = dict(causal=options.get("causal", True), window=options.get("window"))
            plan = None
            if blocks is not None and backend != "reference":
                plan = make_plan(
                    *segments, q_positions=positions[0], kv_positions=positions[1], blocks=blocks, **mask
                )
            return attention(
                q,
                k,
                v,
                q_segment_ids=segments[0],
                kv_segment_ids=segments[1],
                q_positions=positions[0],
                kv_positions=positions[1],
                backend=backend,
                plan=plan,
                return_lse=True,
                **options,
            )

        results, pullback = jax.vjp(call, q, k, v)
        return (*results, *pullback((d_out, d_lse)))

    return run


def interpreted(backend):
    """The context in which a backend runs without its device."""
    return pltpu.force_tpu_interpret_mode() if backend == "tpu" else contextlib.nullcontext()


def check(backend, q, k, v, segments, positions, *, blocks=None, seed=0, slack=None, **options):
    """Compares all five results with the oracle, within the bounds; `slack` in place of the dtype's."""
    rng = np.random.default_rng(seed)
    d_out = rng.normal(size=q.shape).astype(q.dtype)
    d_lse = rng.normal(size=q.shape[:3]).astype(np.float32)
    want = oracle(q, k, v, segments, positions, d_out, d_lse, **options)
    with interpreted(backend):
        got = graded(backend, blocks, tuple(options.items()))(q, k, v, segments, positions, d_out, d_lse)
    # The yardstick has no lse, so its gradients are graded on an oracle of their own.
    rounded = naive_graded(tuple(options.items()))(q, k, v, segments, positions, d_out)
    yardstick = dict(zip(("out", "dq", "dk", "dv"), rounded))
    base = oracle(q, k, v, segments, positions, d_out, np.zeros_like(d_lse), **options)
    base = dict(zip(("out", "lse", "dq", "dk", "dv"), base))
    slack = SLACK[q.dtype.name] if slack is None else slack
    for name, ref, x in zip(("out", "lse", "dq", "dk", "dv"), want, got):
        x = np.asarray(x, np.float64)
        assert np.isfinite(x).all(), f"{name} is not finite"
        if name == "lse":
            np.testing.assert_allclose(x, ref, rtol=1e-5, atol=1e-4)
            continue
        assert not x[ref == 0].any(), f"{name} is not zero where it must be"
        whole, worst = relative(x, ref)
        allowed, allowed_worst = relative(yardstick[name], base[name])
        assert whole <= 1.5 * allowed + slack, f"{name}: {whole:.2e} against {allowed:.2e}"
        assert worst <= 4 * allowed_worst + 16 * slack, f"{name}: worst row {worst:.2e} against {allowed_worst:.2e}"


def draw(rng, B, T, N, K, H, dtype="float32", S=None):
    S = T if S is None else S
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(dtype))) for shape in shapes)


def pack(rng, B, T, documents, empty):
    """Segment ids of `documents` documents of random lengths and up to `empty` tokens of padding, for B rows."""
    rows = []
    for _ in range(B):
        used = T - int(rng.integers(0, empty + 1))
        cuts = np.sort(rng.choice(np.arange(1, used), size=min(documents, used) - 1, replace=False))
        lengths = np.diff([0, *cuts, used])
        rows.append(np.pad(np.repeat(np.arange(1, len(lengths) + 1), lengths), (0, T - used)))
    return jnp.asarray(np.stack(rows).astype(np.int32))


def along(*shapes):
    return tuple(np.broadcast_to(np.arange(n, dtype=np.int32), (b, n)) for b, n in shapes)


# Against the oracle


PLAIN = [("float32", {}), ("float32", {"causal": False}), ("bfloat16", {"softcap": 2.0, "scale": 0.3})]
TELLING = [
    ("bfloat16", {}),
    ("bfloat16", {"window": 40}),
    ("float32", {"causal": False, "window": 9, "softcap": 3.0}),
]  # between them all that an interpreted kernel, slow to run, can get wrong


@pytest.mark.parametrize(
    "backend, dtype, options",
    [(backend, *case) for backend in BACKENDS for case in TELLING + ([] if backend == "tpu" else PLAIN)],
    ids=str,
)
def test_packed_rows(backend, dtype, options):
    rng = np.random.default_rng(0)
    segments = pack(rng, 2, 300, 5, 40)
    check(
        backend, *draw(rng, 2, 300, 4, 2, 64, dtype), (segments,) * 2, along((2, 300)) * 2, blocks=(128, 128), **options
    )


@pytest.mark.parametrize(
    "backend, N, K",
    [(b, *heads) for b in BACKENDS for heads in [(3, 3), (7, 1)] + ([] if b == "tpu" else [(14, 2), (8, 1), (8, 2)])],
)
def test_grouped_heads(backend, N, K):
    rng = np.random.default_rng(1)
    segments = pack(rng, 1, 160, 3, 10)
    check(backend, *draw(rng, 1, 160, N, K, 32), (segments,) * 2, along((1, 160)) * 2, blocks=(128, 128))


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_packings(backend):
    """From one document to as many as tokens, from no padding to nothing else."""

    @hypothesis.settings(max_examples=3 if backend == "tpu" else 8, derandomize=True, deadline=None, database=None)
    @hypothesis.given(
        seed=st.integers(0, 2**31),
        shape=st.sampled_from([(257, (2, 1), (256, 128)), (300, (6, 2), (128, 256))]),
        documents=st.integers(1, 300),
        empty=st.integers(0, 300),
    )
    def compare(seed, shape, documents, empty):
        T, heads, blocks = shape
        rng = np.random.default_rng(seed)
        segments = pack(rng, 1, T, documents, min(empty, T - 1))
        check(backend, *draw(rng, 1, T, *heads, 16), (segments,) * 2, along((1, T)) * 2, blocks=blocks, seed=seed)

    compare()


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunked_prefill(backend):
    """The last 70 of 300 tokens ask; positions say where they are."""
    rng = np.random.default_rng(2)
    kv_segments = pack(rng, 2, 300, 4, 0)
    segments = kv_segments[:, 230:], kv_segments
    positions = tuple(p + np.int32(s) for p, s in zip(along((2, 70), (2, 300)), (230, 0)))
    check(backend, *draw(rng, 2, 70, 4, 2, 32, S=300), segments, positions, blocks=(128, 128))


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_that_restart_and_ids_in_any_order(backend):
    """The mask follows the ids and positions, whatever their order along the row."""
    rng = np.random.default_rng(3)
    segments = rng.integers(0, 4, (2, 280), dtype=np.int32)
    positions = rng.integers(0, 100, (2, 280), dtype=np.int32)
    check(backend, *draw(rng, 2, 280, 2, 1, 16), (segments,) * 2, (positions,) * 2, blocks=(128, 128), window=30)


@pytest.mark.parametrize(
    "backend, dtype", [(b, d) for b in BACKENDS for d in ("bfloat16", "float32") if (b, d) != ("tpu", "float32")]
)
def test_extreme_logits(backend, dtype):
    """Logits of ±1e4: the softmax is one-hot and must neither overflow nor lose the winner.

    A float32 lse of 1e4 is known to 1e-3, and with it the weights that the backward pass recomputes.
    """
    rng = np.random.default_rng(4)
    segments = pack(rng, 1, 200, 2, 5)
    q, k, v = draw(rng, 1, 200, 2, 1, 16)
    q, k = np.round(q * 4), np.round(k * 4)  # exact in bfloat16, so that all see the same logits
    q, k, v = (x.astype(jnp.dtype(dtype)) for x in (q, k, v))
    check(backend, q, k, v, (segments,) * 2, along((1, 200)) * 2, blocks=(128, 128), scale=100.0, slack=2.0**-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_nothing(backend):
    """A row of padding alone, and queries before every key: output 0, finite lse, no gradient."""
    rng = np.random.default_rng(5)
    segments = np.repeat(np.int32([[0], [1]]), 150, axis=1)
    positions = along((2, 150))[0], along((2, 150))[0] + 20
    check(backend, *draw(rng, 2, 150, 2, 1, 16), (segments,) * 2, positions, blocks=(128, 128))


# What must not happen


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_ignores_segment_ids(backend):
    """Two documents in a row give what each gives alone, and a change in one leaves the other's bits alone."""
    rng = np.random.default_rng(6)
    q, k, v = draw(rng, 1, 256, 2, 1, 32)
    segments = jnp.asarray(np.repeat(np.int32([[1, 2]]), 128, axis=1))
    changed_k, changed_v = (x.at[:, :128].set(9) for x in (k, v))
    attend = jax.jit(lambda q, k, v, segments: attention(q, k, v, q_segment_ids=segments, backend=backend))
    with interpreted(backend):
        packed = attend(q, k, v, segments)
        one_mask = attend(q, k, v, jnp.ones_like(segments))
        halves = [(x[:, :128], x[:, 128:]) for x in (q, k, v, jnp.ones_like(segments))]
        alone = [attend(*half) for half in zip(*halves)]
        changed = attend(q, changed_k, changed_v, segments)
    np.testing.assert_allclose(packed, jnp.concatenate(alone, axis=1), atol=1e-5)
    assert jnp.abs(packed - one_mask)[:, 128:].max() > 0.1
    np.testing.assert_array_equal(packed[:, 128:], changed[:, 128:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_hold_anything(backend):
    """NaN and inf in padding reach neither results nor gradients; in a real token they stay visible."""
    rng = np.random.default_rng(7)
    q, k, v = draw(rng, 1, 140, 2, 1, 16)
    segments = jnp.asarray(np.repeat(np.int32([1, 0]), [100, 40])[None])
    dirt = np.where(np.arange(40) % 2, np.nan, np.inf).astype(np.float32)[:, None, None]

    def total(q, k, v):
        out, lse = attention(q, k, v, q_segment_ids=segments, backend=backend, return_lse=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(segments[..., None] != 0, lse, 0)), out

    with interpreted(backend):
        grade = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))
        clean = grade(q, k, v)
        dirty = grade(*(x.at[:, 100:].set(dirt) for x in (q, k, v)))
        _, real = grade(q, k.at[0, 50].set(np.nan), v)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert np.isnan(real[0, 50:100]).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_plan_for_another_mask_is_refused(backend):
    q, k, v = draw(np.random.default_rng(8), 1, 64, 2, 1, 16)
    segments = jnp.ones((1, 64), jnp.int32)
    for options in (dict(causal=False), dict(window=3)):
        with pytest.raises(ValueError, match="the plan was made for"):
            attention(
                q, k, v, q_segment_ids=segments, backend=backend, plan=make_plan(segments, **options)
            )


def test_bad_arguments_say_what_was_expected():
    q, k, v = draw(np.random.default_rng(9), 1, 8, 3, 2, 16)
    with pytest.raises(ValueError, match="must divide"):
        attention(q, k, v, q_segment_ids=None)
    q, k, v = draw(np.random.default_rng(9), 1, 8, 2, 2, 16)
    with pytest.raises(ValueError, match="unknown backend 'triton'"):
        attention(q, k, v, q_segment_ids=None, backend="triton")
    with pytest.raises(ValueError, match="at least 1"):
        attention(q, k, v, q_segment_ids=None, window=0)
    with pytest.raises(ValueError, match="pass kv_segment_ids"):
        attention(q[:, :4], k, v, q_segment_ids=jnp.ones((1, 4), jnp.int32))


def test_what_cudnn_cannot_do_is_said():
    q, k, v = draw(np.random.default_rng(9), 1, 64, 2, 2, 16, "bfloat16")
    ids = jnp.ones((1, 64), jnp.int32)
    requests = {
        "segment ids": dict(q_segment_ids=ids),
        "positions": dict(q_positions=ids, kv_positions=ids),
        "a window": dict(window=3),
        "a softcap": dict(softcap=1.0),
        "lse": dict(return_lse=True),
    }
    for reason, request in requests.items():
        with pytest.raises(NotImplementedError, match=f"'cudnn' cannot do {reason}"):
            attention(q, k, v, **{"q_segment_ids": None, **request}, backend="cudnn")
    with pytest.raises(NotImplementedError, match="cannot do float32"):
        attention(*(x.astype(jnp.float32) for x in (q, k, v)), q_segment_ids=None, backend="cudnn")


def test_what_the_tpu_kernel_cannot_do_is_said():
    q, k, v = draw(np.random.default_rng(9), 1, 64, 2, 2, 16)
    ids = jnp.ones((1, 64), jnp.int32)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        attention(q, k, v, q_segment_ids=ids, backend="tpu", plan=make_plan(ids, blocks=(64, 64)))


def test_the_choice_of_backend():
    """By device, and on GPU by what the device and the kernels can do."""

    class Device(NamedTuple):
        platform: str
        device_kind: str = "some"
        compute_capability: str | None = None

    hopper, ampere = Device("gpu", "H200", "9.0"), Device("gpu", "A100", "8.0")
    both = "mosaic_gpu", "cudnn"
    assert [api.default_backend(Device(p), *both) for p in ("cpu", "tpu")] == ["xla", "tpu"]
    assert [api.default_backend(hopper, *able) for able in (both, both[1:], ())] == ["mosaic_gpu", "cudnn", "xla"]
    assert [api.default_backend(ampere, *able) for able in (both, both[:1])] == ["cudnn", "xla"]
    new = jax.__version_info__ >= (0, 11, 2)
    assert api.packed_backend(hopper, jnp.bfloat16, 128) == ("mosaic_gpu" if new else "xla")
    assert api.packed_backend(hopper, jnp.float32, 128) == api.packed_backend(hopper, jnp.bfloat16, 32) == "xla"


def test_the_choice_of_backend_is_logged_once(caplog):
    api._choose.cache_clear()
    q, k, v = draw(np.random.default_rng(10), 1, 8, 2, 2, 16)
    with caplog.at_level(logging.INFO, logger=api.__name__):
        attention(q, k, v, q_segment_ids=None)
        attention(q, k, v, q_segment_ids=None)
    assert [r.getMessage() for r in caplog.records] == ["attention: backend 'xla' on cpu"]


# Composition


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_of_the_keys_merge_by_lse(backend):
    """Ring attention: attend to two halves of the keys, weigh by exp(lse): value and gradients of the whole."""
    rng = np.random.default_rng(11)
    q, k, v = draw(rng, 1, 256, 2, 1, 16)
    segments = pack(rng, 1, 256, 3, 20)
    positions = jnp.arange(256, dtype=jnp.int32)[None]

    def part(q, k, v, s):
        return attention(
            q,
            k[:, s],
            v[:, s],
            q_segment_ids=segments,
            kv_segment_ids=segments[:, s],
            kv_positions=positions[:, s],
            backend=backend,
            return_lse=True,
        )

    def merged(q, k, v):
        (out_1, lse_1), (out_2, lse_2) = (part(q, k, v, s) for s in (slice(0, 128), slice(128, 256)))
        lse = jnp.logaddexp(lse_1, lse_2)
        out = jnp.exp(lse_1 - lse)[..., None] * out_1 + jnp.exp(lse_2 - lse)[..., None] * out_2
        return jnp.sum(jnp.sin(out))

    def whole(q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, q_segment_ids=segments, backend=backend)))

    with interpreted(backend):
        got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (merged, whole))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), got, want)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_saved_outputs_spare_the_second_forward(backend):
    """Under a policy that saves the named outputs, the backward pass of a checkpointed layer runs no forward."""
    q, k, v = draw(np.random.default_rng(12), 1, 128, 2, 1, 16)
    segments = jnp.ones((1, 128), jnp.int32)

    def products(policy):
        def layer(q, k, v):
            return jnp.sum(attention(q, k, v, q_segment_ids=segments, backend=backend))

        return count_products(jax.make_jaxpr(jax.grad(jax.checkpoint(layer, policy=policy)))(q, k, v).jaxpr)

    save = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    assert products(save) < products(jax.checkpoint_policies.nothing_saveable)


def count_products(jaxpr):
    """Matrix products in a jaxpr and in all that it calls."""
    count = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    for eqn in jaxpr.eqns:
        for x in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            count += count_products(getattr(x, "jaxpr", x)) if is_jaxpr(x) else 0
    return count


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check_vma, kv_heads", [(True, 2), (True, 1), (False, 1)])
def test_shard_map_over_batch_and_heads(backend, check_vma, kv_heads):
    """Batch over data, heads over tensor (a single key-value head is replicated): the result of one device."""
    if backend == "tpu" and check_vma:
        pytest.skip("the TPU interpreter knows no varying axes; test_tpu_compile.py compiles this case")
    rng = np.random.default_rng(13)
    q, k, v = draw(rng, 4, 160, 4, kv_heads, 16)
    segments = pack(rng, 4, 160, 3, 10)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    P = PartitionSpec
    heads = P("data", None, "tensor")
    kv = heads if kv_heads == 2 else P("data")
    plan = make_plan(segments, blocks=(128, 128))

    def local(q, k, v, segments, plan):
        plan = None if backend == "reference" else plan
        return attention(q, k, v, q_segment_ids=segments, backend=backend, plan=plan)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(heads, kv, kv, P("data"), P("data")), out_specs=heads, check_vma=check_vma
    )

    def total(f):
        def value(q, k, v):
            return jnp.sum(jnp.sin(f(q, k, v, segments, plan)))

        return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2)))

    with interpreted(backend):
        got, want = total(sharded)(q, k, v), total(local)(q, k, v)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5), got, want)


def test_batch_sharded_under_plain_jit_moves_no_tensor():
    """The blockwise path splits over the batch by itself: no gather of q, k or v."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((8, 256, 2, 16), jnp.float32, sharding=split)
    segments = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=split)

    def total(q, k, v, segments):
        plan = make_plan(segments, blocks=(64, 64))
        return jnp.sum(attention(q, k, v, q_segment_ids=segments, backend="xla", plan=plan))

    grade = jax.jit(jax.grad(total, argnums=(0, 1, 2)), out_shardings=split)
    text = grade.lower(shape, shape, shape, segments).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text


def test_the_blockwise_path_never_holds_the_logits():
    """Forward and backward of one row of 4096: temporaries far below the T × S logits."""
    T, H = 4096, 16
    shape = jax.ShapeDtypeStruct((1, T, 1, H), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def total(q, k, v, segments):
        return jnp.sum(attention(q, k, v, q_segment_ids=segments, backend="xla"))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(shape, shape, shape, segments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T * 4 / 8
