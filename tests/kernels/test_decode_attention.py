"""Every decode backend against float64 numpy."""

import contextlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dqjax.kernels.attention.api import attention
from dqjax.kernels.decode_attention.api import decode_attention
from dqjax.kernels.decode_attention.mosaic_gpu import WORKERS, Work

BACKENDS = ["reference", "xla", "tpu"]


def interpreted(backend):
    """The context in which a backend runs without its device."""
    return pltpu.force_tpu_interpret_mode() if backend == "tpu" else contextlib.nullcontext()


def oracle(q, k, v, lengths, *, scale=None, softcap=None, window=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, N, H), K = q.shape, k.shape[2]
    out = np.zeros_like(q)
    for b, length in enumerate(lengths):
        seen = slice(max(0, length - (window or length)), length)
        for n in range(N if length else 0):
            logits = k[b, seen, n // (N // K)] @ q[b, n] * (H**-0.5 if scale is None else scale)
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            p = np.exp(logits - logits.max())
            out[b, n] = p / p.sum() @ v[b, seen, n // (N // K)]
    return out


def draw(seed, B, S, N, K, H, dtype):
    rng = np.random.default_rng(seed)
    shapes = (B, N, H), (B, S, K, H), (B, S, K, H)
    q, k, v = (jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(dtype))) for shape in shapes)
    return q, k, v, jnp.asarray(rng.integers(0, S + 1, B).astype(np.int32))


@hypothesis.settings(max_examples=6, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(3, 304, 14, 2, 64), (2, 128, 8, 8, 16), (5, 16, 2, 1, 32)]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    options=st.sampled_from([{}, {"window": 17}, {"softcap": 2.0, "scale": 0.5}]),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, seed, shape, dtype, options):
    q, k, v, lengths = draw(seed, *shape, dtype)
    with interpreted(backend):
        out = np.asarray(decode_attention(q, k, v, lengths, backend=backend, **options), np.float64)
    want = oracle(q, k, v, np.asarray(lengths), **options)
    np.testing.assert_allclose(out, want, atol=2e-2 if dtype == "bfloat16" else 2e-6)
    assert np.linalg.norm(out - want) <= (2.0**-7 if dtype == "bfloat16" else 2.0**-19) * np.linalg.norm(want)
    assert not out[np.asarray(lengths) == 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_pick_the_winner(backend):
    q, k, v, _ = draw(1, 2, 48, 2, 1, 16, "float32")
    lengths = jnp.int32([48, 7])
    with interpreted(backend):
        out = decode_attention(q, k, v, lengths, scale=1e4, backend=backend)
    np.testing.assert_allclose(out, oracle(q, k, v, lengths, scale=1e4), atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_last_row_of_attention(backend):
    q, k, v, _ = draw(2, 2, 48, 4, 2, 16, "float32")
    lengths = jnp.int32([48, 31])
    segments = jnp.int32(np.arange(48) < np.asarray(lengths)[:, None])
    row = attention(
        q[:, None], k, v, q_segment_ids=jnp.ones((2, 1), jnp.int32), kv_segment_ids=segments, causal=False
    )
    with interpreted(backend):
        out = decode_attention(q, k, v, lengths, backend=backend)
    np.testing.assert_allclose(out, row[:, 0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_old_keys_past_the_length_are_not_read(backend):
    q, k, v, _ = draw(3, 1, 208, 2, 1, 16, "float32")
    lengths = jnp.int32([140])
    with interpreted(backend):
        clean = decode_attention(q, k, v, lengths, backend=backend)
        stale = decode_attention(q, k.at[:, 140:].set(1e4), v.at[:, 140:].set(1e4), lengths, backend=backend)
    np.testing.assert_array_equal(clean, stale)


def test_the_cache_is_read_in_place():
    """No copy of the cache: the temporaries of a step stay under a tenth of it (bfloat16 is widened on CPU alone)."""
    cache = jax.ShapeDtypeStruct((2, 4096, 2, 64), jnp.float32)
    shapes = jax.ShapeDtypeStruct((2, 8, 64), jnp.float32), cache, cache, jax.ShapeDtypeStruct((2,), jnp.int32)
    memory = jax.jit(decode_attention).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 2 * 4096 * 2 * 64 * 4 / 10


def test_what_the_tpu_kernel_cannot_do_is_said():
    q, k, v, lengths = draw(5, 2, 10, 4, 2, 16, "float32")
    with pytest.raises(NotImplementedError, match="whole blocks of 16 slots, got 10"):
        decode_attention(q, k, v, lengths, backend="tpu")


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 2.0}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_read_through_their_table(backend, options):
    """Shared pages, lengths on and beside a page's end, and numbers behind the last page that are none."""
    P, page, n, B, N, K, H = 11, 32, 4, 6, 4, 2, 32
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.normal(size=(B, N, H)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(P, page, K, H)), jnp.float32) for _ in range(2))
    lengths = np.array([0, 1, 32, 33, 100, 128], np.int32)
    table = rng.integers(0, P, (B, n)).astype(np.int32)
    table[4, :2] = table[5, :2]
    rows = [x[table].reshape(B, n * page, K, H) for x in (np.asarray(k), np.asarray(v))]
    dead = np.arange(n) * page >= lengths[:, None]
    table[dead] = rng.choice([-3, P, P + 7], dead.sum())
    with interpreted(backend):
        out = decode_attention(q, k, v, jnp.asarray(lengths), pages=jnp.asarray(table), backend=backend, **options)
    np.testing.assert_allclose(out, oracle(q, *rows, lengths, **options), atol=2e-6)


def test_bad_arguments_say_what_was_expected():
    q, k, v, lengths = draw(4, 2, 10, 4, 2, 16, "float32")
    with pytest.raises(ValueError, match="with K dividing N"):
        decode_attention(q[:, :3], k, v, lengths)
    with pytest.raises(ValueError, match="unknown backend 'paged'"):
        decode_attention(q, k, v, lengths, backend="paged")
    with pytest.raises(ValueError, match="at least 1"):
        decode_attention(q, k, v, lengths, window=0)


@pytest.mark.parametrize("heads, rows, parts", [(8, 256, 1), (2, 3, 10), (8, 64, 4), (1, 1, 1), (4, 66, 1), (8, 33, 2)])
def test_hopper_items_are_dealt_once_and_evenly(heads, rows, parts):
    """Every item has one worker, and workers' keys, longest items first, differ by at most the longest item."""
    work, workers = Work(heads, rows, parts), np.arange(WORKERS)
    keys = np.random.default_rng(0).integers(0, 2048, rows * parts)
    order = jnp.asarray(np.argsort(-keys))
    share, seen, load = np.asarray(work.share(workers)), [], np.zeros(WORKERS, int)
    for turn in range(share.max()):
        sequence, part, head, length, _ = work.item(workers, turn, order, jnp.asarray(keys)[order], order)
        has = turn < share
        seen += list(zip(*(np.asarray(x)[has].tolist() for x in (sequence, part, head))))
        load += np.where(has, np.asarray(length), 0)
    assert len(seen) == len(set(seen)) == heads * rows * parts
    assert load.max() - load.min() <= keys.max()
    assert load.sum() == heads * keys.sum()
