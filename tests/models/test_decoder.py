"""What must not change a result: the cache, chunks, rematerialisation, the mesh; and what decoding must not cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.models.cache import make_cache
from dqjax.models.config import SIZES, ModelConfig
from dqjax.models.decoder import REMAT_POLICIES, Decoder
from dqjax.sharding import Rules, make_mesh

TINY = ModelConfig("qwen3", 96, 64, 96, 2, 8, 2, 16, tie_embeddings=False, qk_norm=True)


def one_device():
    return Rules(make_mesh(devices=jax.devices()[:1]))


def noisy(decoder):
    """Random parameters, norms and biases too; by numpy, since jax would compile a generator for every shape."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape, np.float32)
        return 1 + noise if path[-1].key == "scale" else noise

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, decoder.shapes()), decoder.shardings())


def packed_rows(rows=4, length=16, vocab=96):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (rows, length))
    segments, positions = np.zeros((rows, length), int), np.zeros((rows, length), int)
    for row in range(rows):
        cuts = [0, *sorted(rng.choice(np.arange(2, length - 1), 2, replace=False)), length - row % 3]
        for i, (a, b) in enumerate(zip(cuts, cuts[1:])):
            segments[row, a:b], positions[row, a:b] = i + 1, np.arange(b - a)
    return tuple(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments))


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("chunks", [(11,), (4, 4, 3), (1,) * 6, (7, 1, 1, 1)])
def test_prefill_in_chunks_then_decode_equals_forward(chunks, unstacked):
    decoder = Decoder(TINY, one_device())
    params, rows, length = noisy(decoder), 3, 14
    tokens = jax.random.randint(jax.random.key(2), (rows, length), 0, 96)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    whole, _ = jax.jit(decoder.apply)(params, tokens, positions, jnp.ones_like(tokens))
    apply, params = jax.jit(decoder.apply), decoder.unstack(params) if unstacked else params
    cache = make_cache(TINY, decoder.rules, rows=rows, capacity=length + 5, dtype=jnp.float32)
    parts, at = [], 0
    for size in (*chunks, *(1,) * (length - sum(chunks))):
        part, cache = apply(params, tokens[:, at : at + size], positions[:, at : at + size], jnp.ones((rows, size), jnp.int32), cache)
        parts.append(part)
        at += size
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=0, atol=2e-5)
    assert cache.lengths.tolist() == [length] * rows


def test_rows_of_unlike_lengths_share_a_cache():
    """Right-padded prompts are cached without their padding, and a finished row (segment 0) is left alone."""
    decoder = Decoder(TINY, one_device())
    params, apply = noisy(decoder), jax.jit(decoder.apply)
    tokens = jax.random.randint(jax.random.key(2), (2, 8), 0, 96)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    segments = (positions < jnp.array([[8], [5]])).astype(jnp.int32)
    cache = make_cache(TINY, decoder.rules, rows=2, capacity=10, dtype=jnp.float32)
    _, cache = apply(params, tokens, positions, segments, cache)
    assert cache.lengths.tolist() == [8, 5]
    next_token = jnp.array([[7], [9]])
    hidden, after = apply(params, next_token, cache.lengths[:, None], jnp.array([[0], [1]]), cache)
    assert after.lengths.tolist() == [8, 6]
    np.testing.assert_array_equal(after.keys[0][0], cache.keys[0][0])
    alone = jnp.concatenate([tokens[1:, :5], next_token[1:]], 1)
    whole, _ = apply(params, alone, jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32))
    np.testing.assert_allclose(hidden[1, 0], whole[0, 5], rtol=0, atol=2e-5)


def scalar_and_gradients(decoder, params, rows):
    """A scalar of the real tokens' logits, and its gradients."""
    tokens, positions, segments = rows
    probe = jax.random.normal(jax.random.key(5), (*tokens.shape, decoder.config.vocab_size))

    def scalar(params, tokens, positions, segments):
        hidden, _ = decoder.apply(params, tokens, positions, segments)
        logits = hidden @ decoder.output_table(params).T
        return jnp.sum(jnp.where(segments[..., None] > 0, logits * probe, 0)) / logits.size

    rows = jax.device_put((tokens, positions, segments), decoder.rules.sharding(("batch",)))
    return jax.jit(jax.value_and_grad(scalar))(params, *rows)


def assert_close(a, b, tolerance=1e-4):
    for path, x in jax.tree_util.tree_leaves_with_path(a):
        y = dict(jax.tree_util.tree_leaves_with_path(b))[path]
        scale = np.abs(np.asarray(y)).max() + 1e-6
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(y) / scale, rtol=0, atol=tolerance, err_msg=str(path))


@functools.cache
def on_one_device(config):
    """`scalar_and_gradients` of eight packed rows, without a mesh."""
    decoder = Decoder(config, one_device())
    return scalar_and_gradients(decoder, noisy(decoder), packed_rows(rows=8))


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_changes_no_gradient(remat):
    decoder = Decoder(TINY, one_device(), remat=remat)
    assert_close(scalar_and_gradients(decoder, noisy(decoder), packed_rows(rows=8)), on_one_device(TINY))


SPLITS = [  # key-value heads fewer than the tensor axis; six query heads on four or eight devices: not split
    (8, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
    (8, 2, {"data": 8}),
    (8, 2, {"fsdp": 8}),
    (8, 2, {"fsdp": 2, "tensor": 4}),
    (8, 2, {"tensor": 8}),
    (6, 1, {"data": 2, "fsdp": 2, "tensor": 2}),
    (6, 3, {"data": 2, "tensor": 4}),
    (12, 3, {"fsdp": 4, "tensor": 2}),
]


@pytest.mark.parametrize("heads, kv_heads, mesh", SPLITS, ids=str)
def test_sharded_equals_one_device(heads, kv_heads, mesh):
    config = dataclasses.replace(TINY, num_heads=heads, num_kv_heads=kv_heads)
    decoder = Decoder(config, Rules(make_mesh(**mesh)))
    assert_close(scalar_and_gradients(decoder, noisy(decoder), packed_rows(rows=8)), on_one_device(config))


@pytest.mark.parametrize("mesh", [{"fsdp": 2, "data": 4}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_sharded_cache_equals_one_device(mesh):
    single, split = Decoder(TINY, one_device()), Decoder(TINY, Rules(make_mesh(**mesh)))
    tokens = jax.random.randint(jax.random.key(2), (8, 6), 0, 96)
    positions = jnp.broadcast_to(jnp.arange(6), (8, 6))
    results = []
    for decoder in (single, split):
        params = noisy(decoder)
        cache = make_cache(TINY, decoder.rules, rows=8, capacity=8, dtype=jnp.float32)
        for a, b in ((0, 5), (5, 6)):
            part = tokens[:, a:b], positions[:, a:b], jnp.ones((8, b - a), jnp.int32)
            hidden, cache = jax.jit(decoder.apply)(params, *part, cache)
        results.append(np.asarray(hidden))
    np.testing.assert_allclose(*results, rtol=0, atol=2e-5)


def test_init_does_not_depend_on_the_mesh():
    trees = [Decoder(TINY, rules).init(jax.random.key(3)) for rules in (one_device(), Rules(make_mesh(fsdp=4, tensor=2)))]
    for a, b in zip(*map(jax.tree.leaves, trees)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", SIZES)
def test_every_matrix_is_split_over_fsdp(size):
    """Norms and biases (under 0.1% of the parameters) stay whole; everything else is stored once across the axis."""
    decoder = Decoder(SIZES[size], Rules(make_mesh(fsdp=8)))
    whole = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(decoder.shapes()), jax.tree.leaves(decoder.shardings())
    ):
        if path[-1].key in ("scale", "bias"):
            whole += leaf.size
        else:
            assert np.prod(sharding.shard_shape(leaf.shape)) * 8 == leaf.size, (path, sharding.spec)
    assert whole < 1e-3 * decoder.config.num_parameters or size == "miniature"


def test_bfloat16_compute_keeps_float32_parameters():
    decoder = Decoder(TINY, one_device(), dtype=jnp.bfloat16)
    params, rows = noisy(decoder), packed_rows()
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    hidden, _ = jax.jit(decoder.apply)(params, *rows)
    exact, _ = jax.jit(dataclasses.replace(decoder, dtype=jnp.float32).apply)(params, *rows)
    assert hidden.dtype == jnp.bfloat16
    error = jnp.abs(hidden.astype(jnp.float32) - exact)[rows[2] > 0]
    assert jnp.mean(error) < 0.03 * jnp.mean(jnp.abs(exact)), jnp.mean(error)


def decode_memory(decoder, rows, capacity):
    """memory_analysis of one decoding step with a donated cache, and the cache's bytes on a device."""
    config, rules = decoder.config, decoder.rules
    shape = (rows, capacity, config.num_kv_heads, config.head_dim)
    layer = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=rules.sharding(("batch", None, "kv_heads", None), shape))
    layers = (layer,) * config.num_layers
    cache = jax.eval_shape(lambda: make_cache(config, one_device(), rows=1, capacity=1, dtype=jnp.bfloat16))
    number = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=rules.sharding(("batch",)))
    cache = cache._replace(keys=layers, values=layers, lengths=number)
    params = jax.tree.map(
        lambda s, where: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=where), decoder.shapes(), decoder.shardings()
    )

    def step(params, token, cache):
        return decoder.apply(params, token[:, None], cache.lengths[:, None], jnp.ones((rows, 1), jnp.int32), cache)

    compiled = jax.jit(step, donate_argnums=2).lower(params, number, cache).compile()
    size = 2 * config.num_layers * np.prod(layer.sharding.shard_shape(shape)) * 2
    return compiled.memory_analysis(), int(size)


DECODED = dataclasses.replace(SIZES["qwen3-0.6b"], num_layers=4, vocab_size=1024, hidden_size=256, mlp_size=512)


def test_decoding_on_tpu_updates_the_cache_in_place():
    """Compiled for a v5e by the real TPU compiler: the donated cache is the result, temporaries are under 10% of it."""
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    rules = Rules(make_mesh(data=2, tensor=2, devices=devices))
    memory, cache = decode_memory(Decoder(DECODED, rules, dtype=jnp.bfloat16), rows=32, capacity=4096)
    assert memory.alias_size_in_bytes >= cache, (memory, cache)
    assert memory.temp_size_in_bytes < 0.1 * cache, (memory, cache)
