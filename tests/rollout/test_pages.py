"""A cache of pages: the book of who holds which, and the engine that samples from it what it samples from rows."""

import dataclasses

import jax
import numpy as np
import pytest

from dqjax.models.config import SIZES
from dqjax.models.decoder import Decoder
from dqjax.rollout import layout as layout_module
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.pages import Pages
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import Rules, make_mesh

CONFIG = dataclasses.replace(SIZES["miniature"], vocab_size=64, num_layers=2, hidden_size=32, mlp_size=48, head_dim=16)
POSITION = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, size, bytes
PAGE = 16


@pytest.fixture
def paged(monkeypatch):
    monkeypatch.setattr(layout_module, "PAGE", PAGE)
    monkeypatch.setattr(layout_module, "takes_pages", lambda *_: True)


def model(**axes):
    devices = jax.devices()[: int(np.prod(list(axes.values()), dtype=int))]
    decoder = Decoder(CONFIG, Rules(make_mesh(devices=devices, **axes)))
    params = decoder.init(jax.random.key(0))
    params["embed"]["embedding"] *= 10  # logits sharp enough not to be uniform
    return decoder, params


def engine(decoder, **options):
    defaults = {"stop_ids": [18], "vocab": 61, "sampling": Sampling(), "rows": 8, "max_new_tokens": 60}
    return Engine(decoder, **(defaults | options))


def groups(lengths, samples):
    """Prompts of these lengths, several samples of each."""
    prompts = [tuple((7 * i + j) % 17 + 1 for j in range(n)) for i, n in enumerate(lengths)]
    return [Prompt(ids, seed=100 * i + s) for i, ids in enumerate(prompts) for s in range(samples)]


def watched(e):
    """What each decoding call had: (pages in use, pages used twice, slots in use)."""
    calls, decode = [], e.decode

    def run(decoder, fixed, params, slots, stop_at, force_at, table):
        used = stop_at > 0
        held = -(-np.asarray(slots.cache.lengths)[used] // PAGE)
        pages = np.concatenate([row[:n] for row, n in zip(table[used], held)]) if used.any() else np.zeros(0)
        calls.append((len(set(pages)), len(pages) - len(set(pages)), int(used.sum())))
        return decode(decoder, fixed, params, slots, stop_at, force_at, table)

    e.decode = run
    return calls


@pytest.mark.parametrize("positions", [64 + 8 * PAGE, 64 + 14 * PAGE, 64 + 30 * PAGE])
def test_samples_are_those_of_rows(paged, positions):
    """However few the pages: samples that yield theirs come out the same, in their order, and none is lost."""
    decoder, params = model()
    prompts = groups([3, 40, 17, 1, 33, 16, 64, 20], samples=3)
    e = engine(decoder, cache_bytes=POSITION * positions)
    assert e.layout(65).pages == (positions - 64) // PAGE
    calls = watched(e)
    expected = list(engine(decoder, rows=4).generate(params, prompts))
    assert [s.token_ids for s in e.generate(params, prompts)] == [s.token_ids for s in expected]
    assert max(len(s.token_ids) for s in expected) == 60 > min(len(s.token_ids) for s in expected)
    most, shared, slots = map(max, zip(*calls))
    assert most <= e.layout(1).pages
    assert slots > 1 or positions == 64 + 8 * PAGE  # the least: room for one longest sample


def test_a_group_shares_the_whole_pages_of_its_prompt(paged):
    """Eight samples of 48 + 1 + 60 tokens: three pages are there once, not eight times."""
    decoder, params = model()
    e = engine(decoder, cache_bytes=POSITION * (64 + 44 * PAGE))
    calls = watched(e)
    samples = list(e.generate(params, groups([49], samples=8)))
    assert [s.token_ids for s in samples] == [
        s.token_ids for s in engine(decoder, rows=8).generate(params, groups([49], samples=8))
    ]
    _, shared, slots = max(calls, key=lambda call: call[2])
    assert (shared, slots) == (3 * 7, 8)


def test_more_sequences_fit_than_rows_would(paged, monkeypatch):
    """Memory for two longest samples decodes many short ones together."""
    decoder, params = model()
    budget = POSITION * (64 + 16 * PAGE)
    e = engine(decoder, cache_bytes=budget, max_new_tokens=60)
    calls = watched(e)
    list(e.generate(params, groups([3] * 20, samples=1)))
    monkeypatch.setattr(layout_module, "takes_pages", lambda *_: False)
    assert engine(decoder, cache_bytes=budget).layout(3).slots == 2
    assert max(slots for *_, slots in calls) >= 5


def test_a_mesh_samples_the_same(paged):
    """Pages of two data shards, heads of two tensor shards."""
    decoder, params = model(data=2, tensor=2)
    prompts = groups([3, 40, 17, 33], samples=2)
    e = engine(decoder, cache_bytes=POSITION // 2 * (64 + 10 * PAGE))
    assert e.layout(65).pages == 20
    alone, its_params = model()
    expected = [s.token_ids for s in engine(alone).generate(its_params, prompts)]
    assert [s.token_ids for s in e.generate(params, prompts)] == expected


def test_nothing_recompiles(paged):
    decoder, params = model()
    e = engine(decoder, cache_bytes=POSITION * (64 + 14 * PAGE), prompt_tokens=65)
    list(e.generate(params, groups([3, 40], samples=2)))
    sizes = [program._cache_size() for program in (e.prefill, e.admit, e.decode)]
    list(e.generate(params, groups([64, 1, 20, 33], samples=3)))
    assert [program._cache_size() for program in (e.prefill, e.admit, e.decode)] == sizes


def test_memory_for_all_rows_has_no_pages(paged):
    decoder, _ = model()
    assert engine(decoder, cache_bytes=POSITION * (2 * 64 + 8 * 128)).layout(20).page is None
    with pytest.raises(ValueError, match="raise the budget"):
        engine(decoder, cache_bytes=POSITION * (64 + 7 * PAGE)).layout(20)


def test_the_book():
    """Every page has its holders or is free, whatever is asked in whatever order."""
    rng = np.random.default_rng(0)
    book, slots = Pages(slots=6, pages=20, size=4, width=5, shards=2), 6
    held = [[] for _ in range(slots)]
    for _ in range(500):
        slot, other = map(int, rng.integers(0, slots, 2))
        action = rng.integers(0, 3)
        if action == 0:
            positions = int(rng.integers(0, 30))
            free, want = book.free(book.shard(slot)), min(-(-positions // 4), 5) - len(held[slot])
            assert book.extend(slot, positions) == (want <= free)
            if 0 < want <= free:
                held[slot] = book.table[slot, : len(held[slot]) + want].tolist()
        elif action == 1:
            book.release(slot)
            held[slot] = []
        elif not held[slot] and slot // 3 == other // 3:
            book.share(slot, other, 2)
            held[slot] = held[other][:2]
        for shard in range(2):
            mine = {page for s in range(3 * shard, 3 * shard + 3) for page in held[s]}
            assert mine <= set(range(10 * shard, 10 * shard + 10)) and book.free(shard) == 10 - len(mine)
        for s in range(slots):
            assert book.table[s, : len(held[s])].tolist() == held[s]
