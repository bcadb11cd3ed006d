"""Low-rank adapters: PEFT's arithmetic by hand in torch, on a mesh, in generation, and merged into the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.models.cache import make_cache
from dqjax.models.heads import Classifier
from dqjax.models.layers import Linear
from dqjax.models.lora import PRODUCTS, Adapters, LoRAConfig
from dqjax.sharding import Rules, make_mesh
from tests.steps import tiny

B, T = 2, 6


def inputs():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (B, T)), jnp.int32)
    return tokens, jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)), jnp.ones((B, T), jnp.int32)


def made(rules, config=LoRAConfig(rank=4, alpha=8.0), classify=False):
    model = tiny.tiny_decoder(rules)
    model = Classifier(model, labels=1) if classify else model
    adapters = Adapters(model, config)
    place = lambda tree, shardings: jax.tree.map(jax.device_put, tree, shardings)  # noqa: E731
    base = place(tiny.random_like(model.shapes()), model.shardings())
    return model, adapters, base, place(tiny.random_like(adapters.shapes(), seed=5), adapters.shardings())


@pytest.mark.parametrize("spec", ["BTD,DF->BTF", "BTD,DNH->BTNH", "BTNH,NHD->BTD"])
def test_a_product_equals_torch(spec):
    """y = x W + (x A) B, the last two as `torch.nn.functional.linear` of flattened weights, as PEFT computes it."""
    torch = pytest.importorskip("torch")
    sizes = {"B": 2, "T": 3, "D": 8, "F": 5, "N": 2, "H": 3}
    rows, kernel = spec.split("->")[0].split(",")
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    x, w = draw(*(sizes[c] for c in rows)), draw(*(sizes[c] for c in kernel))
    inner = [sizes[c] for c in kernel if c in rows]
    outer = [sizes[c] for c in kernel if c not in rows]
    a, b = draw(*inner, 4), draw(4, *outer)
    module = Linear(spec, w.shape, tuple(kernel), jnp.dtype(jnp.float32))
    found = module.apply({"params": {"kernel": w, "lora_a": a, "lora_b": b}}, jnp.asarray(x))
    flat = torch.as_tensor(x.reshape(6, -1))
    matrix = lambda m, n: torch.as_tensor(m.reshape(n, -1))  # noqa: E731
    low = torch.nn.functional.linear(flat, matrix(a, int(np.prod(inner))).T)
    want = flat @ matrix(w, int(np.prod(inner))) + torch.nn.functional.linear(low, matrix(b, 4).T)
    np.testing.assert_allclose(np.asarray(found).reshape(6, -1), want.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2, "data": 2}], ids=["one", "split"])
def test_merged_computes_what_joined_does_and_training_starts_at_the_base(mesh):
    rules = Rules(make_mesh(**mesh)) if mesh else tiny.one_device()
    model, adapters, base, params = made(rules)
    run = jax.jit(lambda p: model.apply(p, *inputs())[0])
    joined = run(adapters.join(base, params))
    np.testing.assert_allclose(joined, run(adapters.merge(base, params)), rtol=1e-4, atol=1e-5)
    plain = run(base)
    assert np.abs(joined - plain).max() > 1e-2
    fresh = adapters.init(jax.random.key(0), base)
    np.testing.assert_allclose(run(adapters.join(base, fresh)), plain, rtol=1e-5, atol=1e-5)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
        lambda s: (s.shape, s.dtype), adapters.shapes()
    )
    for x in jax.tree.leaves(fresh["layers"]["attention"]["q"]["lora_a"]):
        assert 0 < float(jnp.abs(x).max()) <= 1 / np.sqrt(32)


def test_generation_with_a_cache_uses_the_adapters():
    model, adapters, base, params = made(tiny.one_device())
    whole = adapters.join(base, params)
    tokens, positions, segments = inputs()
    expected, _ = model.apply(whole, tokens, positions, segments)
    cache = make_cache(model.config, model.rules, rows=B, capacity=8, dtype=jnp.float32)
    found, _ = model.apply(whole, tokens, positions, segments, cache)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_targets_choose_the_products_and_a_classifier_trains_its_head():
    _, adapters, base, params = made(
        tiny.one_device(), LoRAConfig(rank=2, targets=["v_proj", "down_proj"]), classify=True
    )
    assert {tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)} == {
        ("layers", "attention", "v", "lora_a"),
        ("layers", "attention", "v", "lora_b"),
        ("layers", "mlp", "down", "lora_a"),
        ("layers", "mlp", "down", "lora_b"),
        ("score", "kernel"),
    }
    start = adapters.init(jax.random.key(0), base)
    np.testing.assert_array_equal(start["score"]["kernel"], base["score"]["kernel"])
    np.testing.assert_array_equal(adapters.join(base, params)["score"]["kernel"], params["score"]["kernel"])
    assert len(PRODUCTS) == 7
