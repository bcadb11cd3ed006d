"""The TPU compiler over every kernel and direction at a real shape, without a TPU: it compiles and fits, no more."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dqjax.kernels.attention.api import attention, make_plan
from dqjax.kernels.decode_attention.api import decode_attention

pytest.importorskip("libtpu")
# A program for a device that is not here can be written to jax's compilation cache, but not read back.
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

IN_CI = ["v5e:2x2", "v6e:2x2"]
NIGHTLY = ["v4:2x2x1", "v5p:2x2x1", "tpu7x:2x2x1"]
SHAPES = {"Qwen3-0.6B": (1, 4096, 16, 8, 128), "Qwen2.5-0.5B": (1, 4096, 14, 2, 64), "Qwen3-32B": (1, 8192, 64, 8, 128)}
CASES = [pytest.param(name, "Qwen3-0.6B", id=name) for name in IN_CI] + [
    pytest.param(name, model, id=f"{name}-{model}", marks=pytest.mark.slow)
    for name in IN_CI + NIGHTLY
    for model in SHAPES
]


def topology(name):
    """The devices of a slice that is not here."""
    try:
        return topologies.get_topology_desc(name, "tpu")
    except Exception as error:
        pytest.skip(f"libtpu gives no topology {name}: {error}")


def shapes_on(name, *shapes):
    """Shapes placed on one device of a topology."""
    place = SingleDeviceSharding(topology(name).devices[0])
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]


def total(q, k, v, segment_ids):
    plan = make_plan(segment_ids, backend="tpu")
    out, lse = attention(q, k, v, q_segment_ids=segment_ids, backend="tpu", plan=plan, return_lse=True)
    return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)


@pytest.mark.parametrize("name, model", CASES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(name, model, direction):
    B, T, N, K, H = SHAPES[model]
    kv = (B, T, K, H), jnp.bfloat16
    operands = shapes_on(name, ((B, T, N, H), jnp.bfloat16), kv, kv, ((B, T), jnp.int32))
    f = total if direction == "forward" else jax.grad(total, argnums=(0, 1, 2))
    lowered = jax.jit(f).lower(*operands)
    kernels = ["forward"] if direction == "forward" else ["forward", "dq", "dkv"]
    assert all(f'kernel_name = "attention_{kernel}"' in lowered.as_text() for kernel in kernels)
    compiled = lowered.compile()
    # The kernels say what they cost: 2 products forward, 3 + 4 backward, over half of the pairs.
    products = 2 if direction == "forward" else 9
    assert compiled.cost_analysis()["flops"] >= products * B * N * T * T * H
    assert compiled.memory_analysis().temp_size_in_bytes < B * N * T * T // 8


def test_a_layer_sharded_over_batch_and_heads():
    """Under shard_map on a 2 × 2 slice, with varying axes checked: what the interpreter cannot run."""
    mesh = Mesh(np.array(topology("v5e:2x2").devices).reshape(2, 2), ("data", "tensor"))
    heads, rows = P("data", None, "tensor"), P("data")
    B, T, N, K, H = 2, 1024, 8, 4, 128

    def shape(dims, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=P())
    def layer(q, k, v, segment_ids):
        return jax.lax.psum(total(q, k, v, segment_ids), ("data", "tensor"))

    kv = shape((B, T, K, H), heads)
    operands = shape((B, T, N, H), heads), kv, kv, shape((B, T), rows, jnp.int32)
    compiled = jax.jit(jax.grad(layer, argnums=(0, 1, 2))).lower(*operands).compile()
    products = compiled.cost_analysis()["flops"] / (B // 2 * N // 2 * T * T * H)
    assert 9 <= products < 10


@pytest.mark.parametrize("name", IN_CI)
@pytest.mark.parametrize("paged", [False, True])
def test_decode_attention_reads_the_cache_in_place(name, paged):
    B, S, N, K, H = 16, 8192, 32, 8, 128
    page = 256
    cache = (B * S // page, page, K, H) if paged else (B, S, K, H)
    shapes = (B, N, H), cache, cache, (B,), (B, S // page)
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32
    q, k, v, lengths, table = shapes_on(name, *zip(shapes, dtypes))
    pages = {"pages": table} if paged else {}
    lowered = jax.jit(functools.partial(decode_attention, backend="tpu")).lower(q, k, v, lengths, **pages)
    assert 'kernel_name = "decode_attention"' in lowered.as_text()
    assert lowered.compile().memory_analysis().temp_size_in_bytes < B * S * K * H * 2 // 10
