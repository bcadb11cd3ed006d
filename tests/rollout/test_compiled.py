"""The engine's programs compiled by the real TPU compiler: the cache stays where it is, and no table is gathered."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.models.cache import make_cache
from dqjax.models.config import SIZES
from dqjax.models.decoder import Decoder
from dqjax.rollout.engine import Engine
from dqjax.rollout.layout import position_bytes
from dqjax.rollout.programs import Admission, make_slots
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import Rules, make_mesh

pytest.importorskip("libtpu")
pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")

CONFIG = dataclasses.replace(SIZES["qwen3-0.6b"], num_layers=3, vocab_size=16384, hidden_size=256, mlp_size=512)


@pytest.fixture(scope="module", params=["rows", "pages"])
def compiled(request):
    """(decode, admit, bytes of the slots' cache on a device) on a mesh of data × tensor; pages for half of the rows."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    rules = Rules(make_mesh(data=2, tensor=2, devices=devices))
    decoder = Decoder(CONFIG, rules, dtype=jnp.bfloat16)
    here = dataclasses.replace(decoder, rules=Rules(make_mesh(devices=jax.devices()[:1])))
    sampling = Sampling(0.6, top_k=20, top_p=0.95)
    limits = {"rows": 32, "max_new_tokens": 4096}
    if request.param == "pages":
        limits["cache_bytes"] = 16 // 2 * 5120 * position_bytes(CONFIG, rules, jnp.bfloat16)
    engine = Engine(decoder, stop_ids=[1], vocab=CONFIG.vocab_size, sampling=sampling, **limits)
    layout = engine.layout(1024)
    assert (layout.page is None) == (request.param == "rows") and layout.slots == 32

    def shape(x, sharding=None):
        names = ("batch", None, "kv_heads", None) if x.ndim == 4 else ("batch",)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or rules.sharding(names, x.shape))

    capacity = layout.capacities[-1]
    held = {"slots": layout.slots, "capacity": layout.page or capacity, "pages": layout.pages}
    slots = jax.tree.map(shape, jax.eval_shape(lambda: make_slots(here, **held)))
    lanes = {"rows": layout.lanes, "capacity": layout.room, "dtype": jnp.bfloat16}
    lanes = jax.tree.map(shape, jax.eval_shape(lambda: make_cache(CONFIG, here.rules, **lanes)))
    params = jax.tree.map(shape, jax.eval_shape(decoder.unstack, decoder.shapes()), decoder.unstacked_shardings())
    whole = rules.sharding(())
    bound = jax.ShapeDtypeStruct((layout.slots,), jnp.int32, sharding=whole)
    entry = Admission(*(jax.ShapeDtypeStruct((layout.lanes,), t, sharding=whole) for t in "i4 i4 i4 i4 u4".split()))
    table = None
    if layout.page:
        table = jax.ShapeDtypeStruct((layout.slots, capacity // layout.page), jnp.int32, sharding=whole)
        pages = jax.ShapeDtypeStruct((layout.lanes, layout.room // layout.page), jnp.int32, sharding=whole)
        entry = entry._replace(pages=pages)
    decode = engine.decode.lower(decoder, engine.fixed, params, slots, bound, bound, table).compile()
    admit = engine.admit.lower(slots, lanes, entry).compile()
    cache = sum(2 * np.prod(x.sharding.shard_shape(x.shape)) for x in (*slots.cache.keys, *slots.cache.values))
    return decode, admit, int(cache)


def test_decoding_updates_the_cache_in_place(compiled):
    """Many steps in one loop, and the donated cache is the result; temporaries are under 2% of it."""
    decode, _, cache = compiled
    memory = decode.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.02 * cache, (memory.temp_size_in_bytes, cache)


def test_admission_updates_the_cache_in_place(compiled):
    """Lanes are brought to all shards, a quarter of the slots' memory here; the slots stay."""
    _, admit, cache = compiled
    memory = admit.memory_analysis()
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < 0.3 * cache, (memory.temp_size_in_bytes, cache)


def test_no_step_gathers_the_table_or_the_cache(compiled):
    decode, _, _ = compiled
    moved = re.findall(
        r" = \(?\w+\[([\d,]+)\]\S* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", decode.as_text()
    )
    largest = max(np.prod([int(n) for n in dims.split(",")]) for dims in moved)
    assert largest <= 16 * CONFIG.vocab_size  # the logits of a shard's rows
