import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.models.config import SIZES
from dqjax.models.decoder import Decoder
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import Rules, make_mesh

CONFIG = dataclasses.replace(SIZES["miniature"], vocab_size=64, num_layers=2, hidden_size=32, mlp_size=48, head_dim=16)
PROMPTS = [Prompt(tuple(range(1, 1 + n)), seed) for seed, n in enumerate([3, 20, 1, 70, 9, 33])]


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(CONFIG, Rules(make_mesh(devices=jax.devices()[:1])))
    params = decoder.init(jax.random.key(0))
    params["embed"]["embedding"] *= 10  # logits sharp enough not to be uniform
    return decoder, params


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
    for prompt, sample in zip(PROMPTS, engine(decoder, sampling=sampling, vocab=64, stop_ids=[63]).generate(params, PROMPTS)):
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
