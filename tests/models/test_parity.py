"""Logits, gradients and greedy tokens against transformers' own models, float32 on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.convert.names import entries
from dqjax.losses.cross_entropy import cross_entropy
from dqjax.models.cache import make_cache
from dqjax.types import Batch

torch = pytest.importorskip("torch")

T = 24
DOCUMENTS = (T, 15, 9, 8, 5)  # a full row; a row with 9 left over as padding; a row packed from 9 + 8 + 5 and 2 padding


def rows_of(documents, vocab):
    """The documents as `tokens, positions, segment_ids [3, T]`, and where each lies: (row, start, length)."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, vocab, n) for n in documents]
    tokens = rng.integers(0, vocab, (3, T))  # whatever padding holds must not matter
    positions, segments = np.zeros((3, T), int), np.zeros((3, T), int)
    places = [(0, 0, T), (1, 0, 15), (2, 0, 9), (2, 9, 8), (2, 17, 5)]
    for text, (row, start, n) in zip(texts, places):
        tokens[row, start : start + n] = text
        positions[row, start : start + n] = np.arange(n)
        segments[row, start : start + n] = segments[row].max() + 1
    return jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments), texts, places


def logits_of(decoder):
    return jax.jit(lambda params, *x: decoder.apply(params, *x)[0] @ decoder.output_table(params).T)


def compare_logits(model, decoder, params):
    tokens, positions, segments, texts, places = rows_of(DOCUMENTS, decoder.config.vocab_size)
    ours = np.asarray(logits_of(decoder)(params, tokens, positions, segments))
    for text, (row, start, n) in zip(texts, places):
        with torch.no_grad():
            expected = model(torch.tensor(text)[None]).logits[0].numpy()
        np.testing.assert_allclose(ours[row, start : start + n], expected, rtol=0, atol=1e-4)
    with torch.no_grad():  # transformers' own right padding, by attention_mask
        mask = torch.tensor(np.asarray(segments[1:2] > 0), dtype=torch.long)
        expected = model(torch.tensor(np.asarray(tokens[1:2])), attention_mask=mask).logits[0, :15].numpy()
    np.testing.assert_allclose(ours[1, :15], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("ratio, head_dim", [(1, 64), (2, 64), (7, 64), (1, 128), (2, 128), (7, 128)])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tiny, load, family, ratio, head_dim, tied):
    model, folder = tiny(family, ratio, head_dim, tied)
    compare_logits(model, *load(folder))


YARN = {
    "new": {"rope_parameters": (("rope_type", "yarn"), ("rope_theta", 10000.0), ("factor", 4.0),
                                ("original_max_position_embeddings", 16), ("beta_fast", 32.0), ("beta_slow", 1.0))},
    "attention factor": {"rope_parameters": (("rope_type", "yarn"), ("rope_theta", 1e6), ("factor", 8.0),
                                             ("original_max_position_embeddings", 64), ("attention_factor", 0.7))},
    "untruncated": {"rope_parameters": (("rope_type", "yarn"), ("rope_theta", 5e5), ("factor", 2.0),
                                        ("original_max_position_embeddings", 32), ("truncate", False))},
}  # fmt: skip


@pytest.mark.parametrize("form", YARN)
def test_yarn_equals_transformers(tiny, load, form):
    model, folder = tiny("qwen2", **YARN[form])
    decoder, params = load(folder)
    assert decoder.config.yarn is not None
    compare_logits(model, decoder, params)


@pytest.mark.parametrize("family, tied", [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_greedy_tokens_equal_transformers(tiny, load, family, tied):
    model, folder = tiny(family, tied=tied)
    decoder, params = load(folder)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 160, n) for n in (5, 11)]
    steps, width = 64, 11
    tokens, segments = np.zeros((2, width), int), np.zeros((2, width), int)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
    positions = np.broadcast_to(np.arange(width), (2, width))

    @jax.jit
    def run(params, cache, tokens, positions, segments):
        hidden, cache = decoder.apply(params, tokens, positions, segments, cache)
        last = jnp.take_along_axis(hidden, (segments.sum(1) - 1)[:, None, None], 1)[:, 0]
        return jnp.argmax(last @ decoder.output_table(params).T, -1), cache

    cache = make_cache(decoder.config, decoder.rules, rows=2, capacity=width + steps, dtype=jnp.float32)
    token, cache = run(params, cache, tokens, positions, segments)
    chosen = [token]
    for _ in range(steps - 1):
        token, cache = run(params, cache, token[:, None], cache.lengths[:, None], jnp.ones((2, 1), jnp.int32))
        chosen.append(token)
    for row, prompt in enumerate(prompts):
        expected = model.generate(
            torch.tensor(prompt)[None], max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert np.stack(chosen)[:, row].tolist() == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family, tied", [("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True)])
def test_sft_gradients_equal_autograd(tiny, load, family, tied):
    model, folder = tiny(family, tied=tied)
    decoder, params = load(folder)
    tokens, positions, segments, texts, places = rows_of(DOCUMENTS, 160)
    targets, trained = np.zeros((3, T), int), np.zeros((3, T), bool)
    for text, (row, start, n) in zip(texts, places):
        targets[row, start : start + n - 1] = text[1:]
        trained[row, start + 2 : start + n - 1] = True  # the first three tokens play the prompt
    weight = trained / trained.sum()
    batch = Batch(tokens, jnp.asarray(targets), segments, positions, jnp.asarray(weight, jnp.float32), segments)

    def loss(params):
        hidden, _ = decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        return cross_entropy(hidden, decoder.output_table(params), batch, decoder.rules)[0]

    ours, grads = jax.jit(jax.value_and_grad(loss))(params)

    model.zero_grad()
    total = 0
    for text, _ in zip(texts, places):
        logits = model(torch.tensor(text)[None]).logits[0, 2:-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(text[3:]), reduction="sum")
    (total / int(trained.sum())).backward()
    np.testing.assert_allclose(float(ours), total.item() / int(trained.sum()), rtol=1e-5)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    for entry in entries(decoder.config):
        leaf = grads
        for key in entry.path:
            leaf = leaf[key]
        for layer, name in enumerate(entry.stored_names):
            mine = np.asarray(leaf if entry.layers is None else leaf[layer])
            expected = theirs.pop(name)
            error = np.abs(entry.layout.restore(mine, decoder.config) - expected).max()
            # A key's bias shifts all logits of a query alike: its true gradient is 0, and both sides hold rounding noise.
            scale = max(np.abs(expected).max(), 1e-3 if name.endswith("k_proj.bias") else 0)
            assert error <= 1e-4 * scale, (name, error, scale)
    assert not theirs
