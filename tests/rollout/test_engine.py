import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.models.config import SIZES
from dqjax.models.decoder import Decoder
from dqjax.rollout import engine as engine_module
from dqjax.rollout import layout as layout_module
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.sampling import Sampling, filter_logits
from dqjax.rollout.stops import StopStrings, ThinkingEnd
from dqjax.sharding import Rules, make_mesh
from tests.rollout.test_sampling import chi_square

CONFIG = dataclasses.replace(SIZES["miniature"], vocab_size=64, num_layers=2, hidden_size=32, mlp_size=48, head_dim=16)
PROMPTS = [Prompt(tuple(range(1, 1 + n)), seed) for seed, n in enumerate([3, 20, 1, 70, 9, 33])]


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG, Rules(make_mesh(devices=jax.devices()[:1])))
    params = decoder.init(jax.random.key(0))
    params["embed"]["embedding"] *= 10  # logits sharp enough not to be uniform
    return decoder, params


CLOSE = ThinkingEnd((5, 6), lambda ids: "5, 6" in str(ids))


def engine(decoder, **options):
    defaults = {"stop_ids": [60], "vocab": 61, "sampling": Sampling(), "rows": 2, "max_new_tokens": 24}
    return Engine(decoder, **(defaults | options))


def forward(decoder, params, ids):
    """Hidden states of one sequence, without a cache."""
    tokens = jnp.asarray([ids], jnp.int32)
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    return jax.jit(decoder.apply)(params, tokens, positions, jnp.ones_like(tokens))[0][0]


def test_logprobs_equal_the_trainers(model):
    """What the sampler reports is what a forward pass over prompt and sample gives, to 1e-4."""
    decoder, params = model
    sampling = Sampling(temperature=0.8)
    for prompt, sample in zip(
        PROMPTS, engine(decoder, sampling=sampling, vocab=64, stop_ids=[63]).generate(params, PROMPTS)
    ):
        hidden = forward(decoder, params, prompt.token_ids + sample.token_ids)
        logprobs = jax.nn.log_softmax(hidden @ decoder.output_table(params).T / 0.8)
        n = len(prompt.token_ids)
        expected = [logprobs[n - 1 + t, token] for t, token in enumerate(sample.token_ids)]
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-4)


def test_greedy_equals_the_argmax_of_a_forward_pass(model):
    decoder, params = model
    for prompt, sample in zip(PROMPTS, engine(decoder, sampling=Sampling(temperature=0)).generate(params, PROMPTS)):
        hidden = forward(decoder, params, prompt.token_ids + sample.token_ids)
        best = np.asarray(jnp.argmax((hidden @ decoder.output_table(params).T)[:, :61], -1))
        n = len(prompt.token_ids)
        np.testing.assert_array_equal(sample.token_ids, best[n - 1 : -1])


def test_a_sample_is_the_same_whatever_the_batch(model):
    decoder, params = model
    alone = [next(engine(decoder, rows=1).generate(params, [p])) for p in PROMPTS]
    together = list(engine(decoder, rows=6).generate(params, PROMPTS))
    backwards = list(engine(decoder, rows=4).generate(params, PROMPTS[::-1]))[::-1]
    assert [s.token_ids for s in alone] == [s.token_ids for s in together] == [s.token_ids for s in backwards]
    assert len({s.token_ids for s in together}) > 1


def test_seeds_and_stops(model):
    decoder, params = model
    prompts = [Prompt((1, 2, 3), seed) for seed in range(40)]
    samples = list(engine(decoder, rows=8, stop_ids=[18]).generate(params, prompts))
    assert len({s.token_ids for s in samples}) > 20
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    for s in samples:
        assert (s.token_ids[-1] == 18) == (s.finish_reason == "stop")
        assert 18 not in s.token_ids[:-1]
        assert len(s.token_ids) == len(s.logprobs) == 24 or s.finish_reason == "stop"
        assert max(s.token_ids) < 61, "a padded row of the table was sampled"
    other = list(engine(decoder, rows=8, stop_ids=[18], seed=1).generate(params, prompts))
    assert [s.token_ids for s in other] != [s.token_ids for s in samples]


def test_samples_have_the_policys_distribution(model):
    """Chi-square of 4,000 first tokens of one prompt, through slots and refills, at the 0.1% level."""
    decoder, params = model
    sampling = Sampling(temperature=1.3, top_k=12, top_p=0.9)
    hidden = forward(decoder, params, (1, 2, 3))
    logits = (hidden @ decoder.output_table(params).T)[-1:, :61]
    expected = np.asarray(jax.nn.softmax(filter_logits(logits, sampling))[0])
    prompts = [Prompt((1, 2, 3), seed) for seed in range(4_000)]
    samples = engine(decoder, rows=256, sampling=sampling, max_new_tokens=1).generate(params, prompts)
    statistic, critical = chi_square(np.bincount([s.token_ids[0] for s in samples], minlength=61), expected)
    assert (expected > 0).sum() > 4 and statistic <= critical


def test_a_mesh_samples_the_same(model):
    decoder, params = model
    rules = Rules(make_mesh(data=2, fsdp=2, tensor=2))
    spread = Decoder(CONFIG, rules)
    placed = jax.device_put(params, spread.shardings())
    ours = list(engine(spread, rows=4, sampling=Sampling(temperature=0)).generate(placed, PROMPTS))
    theirs = list(engine(decoder, rows=4, sampling=Sampling(temperature=0)).generate(params, PROMPTS))
    assert [s.token_ids for s in ours] == [s.token_ids for s in theirs]


def test_bad_requests(model):
    decoder, params = model
    with pytest.raises(ValueError, match="an empty prompt"):
        list(engine(decoder).generate(params, [Prompt((), 0)]))
    with pytest.raises(ValueError, match="no stop ids"):
        engine(decoder, stop_ids=[])
    with pytest.raises(ValueError, match="3 sequences do not divide over 8 batch shards"):
        engine(Decoder(CONFIG, Rules(make_mesh(fsdp=8))), rows=3)


def ids_of(samples):
    return [s.token_ids for s in samples]


def test_greedy_equals_transformers(tiny, load):
    """Token for token, in float32, prompts of 1 to 70 tokens in two slots."""
    torch = pytest.importorskip("torch")
    theirs, folder = tiny("qwen3", tied=False)
    decoder, params = load(folder)
    greedy = engine(decoder, sampling=Sampling(temperature=0), stop_ids=[160], vocab=160)
    for prompt, sample in zip(PROMPTS, greedy.generate(params, PROMPTS), strict=True):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt.token_ids]), do_sample=False, max_new_tokens=24, eos_token_id=None
            )
        assert sample.token_ids == tuple(out[0, len(prompt.token_ids) :].tolist())


@pytest.fixture
def compiled():
    """Names of the programs compiled so far."""
    names = []

    class Listener(logging.Handler):
        def emit(self, record):
            if found := re.search(r"Finished XLA compilation of (\S+)", record.getMessage()):
                names.append(found[1])

    listener, logger = Listener(), logging.getLogger("jax")
    logger.addHandler(listener)
    with jax.log_compiles(True):
        yield names
    logger.removeHandler(listener)


def test_nothing_recompiles_after_the_first_call(model, compiled):
    """Other prompts, other lengths, other numbers of them, groups, budgets, other parameters: the same programs."""
    decoder, params = model
    e, later = engine(decoder, rows=4, thinking_end=CLOSE), jax.tree.map(jnp.array, params)
    list(e.generate(params, [Prompt(tuple(range(60)) * 2, 0)]))
    assert "jit(decode)" in compiled
    compiled.clear()
    list(e.generate(params, PROMPTS))
    list(e.generate(later, [Prompt((1, 2), 3)]))
    list(
        e.generate(
            params, [Prompt((7,) * n, i, thinking_budget=i) for i, n in enumerate((1, 9, 9, 9, 9, 128, 64, 65, 2))]
        )
    )
    assert compiled == []
    list(e.generate(params, [Prompt((1,) * 200, 0)]))  # outgrows the cache
    assert "jit(decode)" in compiled


def test_room_for_a_longest_prompt_is_made_at_once(model, compiled):
    """So that the shapes, and with them the last bits of a sample, do not depend on what was sampled before."""
    decoder, params = model
    e = engine(decoder, rows=2, prompt_tokens=200)
    (first,) = e.generate(params, [Prompt((1, 2, 3), 5)])
    compiled.clear()
    list(e.generate(params, [Prompt((1,) * 200, 0)]))
    assert compiled == [] and list(e.generate(params, [Prompt((1, 2, 3), 5)])) == [first]


def test_a_long_prompt_among_short_ones(model):
    """It waits for a larger cache; nothing before or after it changes."""
    decoder, params = model
    long = Prompt(tuple(i % 61 for i in range(150)), 77)
    mixed = [*PROMPTS[:3], long, *PROMPTS[3:]]
    (alone,) = ids_of(engine(decoder).generate(params, [long]))
    expected = ids_of(engine(decoder).generate(params, PROMPTS))
    assert ids_of(engine(decoder, rows=1).generate(params, mixed)) == [*expected[:3], alone, *expected[3:]]


def test_a_group_is_prefilled_once(model, monkeypatch):
    """Eight samples of one prompt, three of another: as many prefills of each as a single sample takes."""
    decoder, params = model
    lanes, lane = [], engine_module._Lane
    monkeypatch.setattr(engine_module, "_Lane", lambda *given: lanes.append(lane(*given)) or lanes[-1])
    group = [Prompt((1, 2, 3), i) for i in range(8)] + [Prompt((4, 5), i) for i in range(3)]
    samples = list(engine(decoder, rows=4).generate(params, group))
    assert len(lanes) == 2
    assert [len({s.token_ids for s in part}) for part in (samples[:8], samples[8:])] == [8, 3]
    alone = [next(engine(decoder, rows=4).generate(params, [p])) for p in group[6:10]]
    assert ids_of(alone) == ids_of(samples[6:10])


def test_a_finished_slot_is_refilled_at_once(model):
    """Samples of very unlike lengths in two slots take little more calls than their tokens need."""
    decoder, params = model
    e = engine(decoder, rows=2, stop_ids=[18], max_new_tokens=64)
    calls, decode = [], e.decode
    e.decode = lambda *given: calls.append(1) or decode(*given)
    lengths = [len(s.token_ids) for s in e.generate(params, [Prompt((1, 2, 3), seed) for seed in range(30)])]
    assert min(lengths) < 5 and max(lengths) == 64
    in_order = sum(max(lengths[i : i + 2]) for i in range(0, 30, 2))  # a static batch of two
    assert len(calls) * 16 < in_order + 15 * 8
    needed = sum(-(-n // 16) for n in lengths)
    assert len(calls) <= needed // 2 + 4


def test_the_cache_fits_its_budget(model):
    decoder, params = model
    position = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, size, bytes
    for slots in (1, 3):
        layout = engine(decoder, rows=8, cache_bytes=position * (slots * 128 + 64)).layout(20)
        assert (layout.slots, layout.lanes, layout.capacities, layout.room) == (slots, 1, (128,), 64)
    small = engine(decoder, rows=8, cache_bytes=position * (3 * 128 + 64))
    assert ids_of(small.generate(params, PROMPTS[:4])) == ids_of(engine(decoder).generate(params, PROMPTS[:4]))
    with pytest.raises(ValueError, match="takes 0.00 GiB a device, and its budget is 0.00 GiB"):
        list(engine(decoder, cache_bytes=position).generate(params, PROMPTS))


def test_a_large_cache_grows_and_shrinks_with_its_longest_sample(model, monkeypatch):
    decoder, params = model
    options = {"rows": 2, "max_new_tokens": 400, "stop_ids": [18]}
    prompts = [Prompt((1, 2, 3), seed) for seed in range(40)]
    expected = ids_of(engine(decoder, **options).generate(params, prompts))
    monkeypatch.setattr(layout_module, "GROWS_FROM", {"cpu": 0})
    e = engine(decoder, **options)
    assert e.layout(3).capacities == (128, 192, 256, 320, 448, 512)
    capacities, decode = [], e.decode
    e.decode = lambda *given: capacities.append(given[3].cache.capacity) or decode(*given)
    assert ids_of(e.generate(params, prompts)) == expected
    changes = np.diff(capacities)
    longest = max(map(len, expected))
    assert max(capacities) >= longest + 3 and (changes > 0).any() and (changes < 0).any()
    assert min(capacities) == 128


def test_a_thinking_budget_ends_thinking(model):
    """At the budget the closing tag follows, token by token, with the log-probabilities that the policy gives it."""
    decoder, params = model
    forced = engine(decoder, rows=3, thinking_end=CLOSE, sampling=Sampling(temperature=0.8))
    free = ids_of(engine(decoder, rows=3, sampling=Sampling(temperature=0.8)).generate(params, PROMPTS))
    budgets = [7, None, 0, 23, 24, 7]
    samples = list(
        forced.generate(params, [dataclasses.replace(p, thinking_budget=b) for p, b in zip(PROMPTS, budgets)])
    )
    for sample, without, budget in zip(samples, free, budgets):
        if budget is None or budget >= 24:
            assert sample.token_ids == without and not sample.forced
            continue
        assert sample.token_ids[:budget] == without[:budget]
        assert sample.token_ids[budget : budget + 2] == (5, 6)[: 24 - budget]
        assert sample.forced == range(budget, min(budget + 2, 24))
    hidden = forward(decoder, params, PROMPTS[0].token_ids + samples[0].token_ids)
    logprobs = jax.nn.log_softmax((hidden @ decoder.output_table(params).T)[:, :61] / 0.8)
    expected = logprobs[jnp.arange(2, 26), jnp.array(samples[0].token_ids)]
    np.testing.assert_allclose(samples[0].logprobs, expected, atol=1e-4)


def test_thinking_that_has_ended_is_not_ended_again(model):
    decoder, params = model
    options = {"rows": 8, "sampling": Sampling(temperature=2.0), "stop_ids": [61]}
    prompts = [Prompt((1, 2, 3), seed) for seed in range(60)]
    plain = ids_of(engine(decoder, **options).generate(params, prompts))
    end = ThinkingEnd((5, 6), lambda ids: 18 in ids)
    prompts = [dataclasses.replace(p, thinking_budget=12) for p in prompts]
    samples = list(engine(decoder, **options, thinking_end=end).generate(params, prompts))
    ended = [18 in ids[:12] for ids in plain]
    assert 5 < sum(ended) < 55
    for sample, ids, unforced in zip(samples, plain, ended, strict=True):
        assert sample.forced == (range(0) if unforced else range(12, 14))
        assert sample.token_ids == ids if unforced else sample.token_ids[12:14] == (5, 6)


def test_stop_strings_cut_at_the_token_that_completes_them(model):
    """Ids spell text in which the string may begin and end inside a token."""
    decoder, params = model
    spell = lambda ids: "".join(f"<{i}>" for i in ids)  # noqa: E731
    prompts = [Prompt((1, 2, 3), seed) for seed in range(20)]
    free = list(engine(decoder, rows=4).generate(params, prompts))
    stops = StopStrings(("8><", "><3>"), spell)
    samples = list(engine(decoder, rows=4, stop_strings=stops).generate(params, prompts))
    assert {s.stop_string for s in samples} == {"8><", "><3>", None}
    for sample, whole in zip(samples, free, strict=True):
        n = len(sample.token_ids)
        assert sample.token_ids == whole.token_ids[:n] and sample.logprobs == whole.logprobs[:n]
        text = spell(sample.token_ids)
        if sample.stop_string:
            assert sample.finish_reason == "stop" and sample.stop_string in text
            assert not any(s in spell(sample.token_ids[:-1]) for s in stops.strings)
        else:
            assert n == len(whole.token_ids) and not any(s in text for s in stops.strings)


def test_stop_strings_keep_the_tokens_that_transformers_keeps(tiny, load):
    torch = pytest.importorskip("torch")
    from dqjax.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words, and others: 12 + 34 = 46"] * 3, 300)
    theirs, folder = tiny("qwen3", vocab=320, tied=False)
    decoder, params = load(folder)
    letters = 90  # of the first tokens: single characters
    options = {"sampling": Sampling(temperature=0), "stop_ids": [320], "vocab": letters}
    prompt = Prompt(tuple(tokenizer("12 + 34 =")["input_ids"]), 0)
    (free,) = engine(decoder, **options).generate(params, [prompt])
    text = tokenizer.decode(list(free.token_ids))
    for start in (3, len(text) // 2):
        string = text[start : start + 4]
        (sample,) = engine(decoder, **options, stop_strings=StopStrings((string,), tokenizer.decode)).generate(
            params, [prompt]
        )
        ids = torch.tensor([prompt.token_ids])
        settings = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
        settings["suppress_tokens"] = list(range(letters, 320))
        out = theirs.generate(ids, stop_strings=[string], tokenizer=tokenizer, **settings)
        assert sample.token_ids == tuple(out[0, len(prompt.token_ids) :].tolist())
        assert sample.stop_string == string and 4 <= len(sample.token_ids) < 24 and text.isascii()


def test_settings_that_cannot_be(model):
    decoder, params = model
    with pytest.raises(ValueError, match="does not know how thinking ends"):
        list(engine(decoder).generate(params, [Prompt((1,), 0, thinking_budget=3)]))
    with pytest.raises(ValueError, match="none of them empty"):
        StopStrings(("", "x"), str)
