"""Small things the objectives are tried on: packed batches, a language model that is also written in torch."""

import dataclasses
import typing

import dqjax.types

for protocol in (dqjax.types.Loss, dqjax.types.LanguageModel, dqjax.types.Source):
    typing.runtime_checkable(protocol)  # beartype checks arguments against them; before dqjax.steps is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from dqjax.data.pack import Tokens, pack_items  # noqa: E402
from dqjax.models.config import SIZES  # noqa: E402
from dqjax.models.decoder import Decoder  # noqa: E402
from dqjax.sharding import Rules, make_mesh  # noqa: E402
from dqjax.steps.accumulate import accumulated_gradients  # noqa: E402

VOCAB, WIDTH, LONGEST = 23, 8, 32


class Bigram:
    """hidden = tanh(embed[token] + place[position]); logits = hidden · tableᵀ. Has no memory, so torch needs no mask."""

    def __init__(self, rows: int = VOCAB):
        self.rows = rows

    def init(self, seed: int, scale: float = 1.0) -> dict:
        rng = np.random.default_rng(seed)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)  # noqa: E731
        return {"embed": draw(VOCAB, WIDTH), "place": draw(LONGEST, WIDTH), "table": draw(self.rows, WIDTH)}

    def apply(self, params, tokens, positions, segment_ids, cache=None):
        return jnp.tanh(params["embed"][tokens] + params["place"][positions]), None

    def output_table(self, params):
        return params["table"]


def torch_copy(params: dict) -> dict:
    """The parameters as torch leaves."""
    import torch

    return {name: torch.tensor(np.asarray(x), requires_grad=True) for name, x in params.items()}


def torch_logits(params: dict, ids):
    """`Bigram` in torch for one sequence of ids; [n, rows]."""
    import torch

    ids = torch.as_tensor(np.asarray(ids), dtype=torch.long)
    return torch.tanh(params["embed"][ids] + params["place"][: len(ids)]) @ params["table"].T


def torch_logprobs(params: dict, ids, temperature: float = 1.0):
    """log p of ids[1:], and the entropies of the distributions they were drawn from; [n - 1] each."""
    import torch

    logp = torch.log_softmax(torch_logits(params, ids)[:-1] / temperature, dim=-1)
    targets = torch.as_tensor(np.asarray(ids)[1:], dtype=torch.long)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def sequences(seed: int, count: int, prompt: int = 4, completion: int = 9) -> list[tuple[np.ndarray, int]]:
    """(ids, prompt length) of random sequences of at most prompt + completion tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        p, c = rng.integers(1, prompt + 1), rng.integers(2, completion + 1)
        made.append((rng.integers(0, VOCAB, p + c).astype(np.int32), int(p)))
    return made


def tokens_of(ids, prompt: int, values=None, token_values=None) -> Tokens:
    """A sequence trained on everything behind its prompt."""
    return Tokens(np.asarray(ids, np.int32), np.arange(len(ids)) >= prompt, values or {}, token_values or {})


def pack(items, row_length=32, rows=None, **options):
    """A packed batch, of `rows` rows (empty ones added) where given."""
    return pack_items(items, row_length, row_multiple=rows or 1, reduction="sum", **options)


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def value_and_grad(loss, params, batch, frozen=None, parts=1):
    """(gradients, value, metrics) of a loss on a numpy batch, in `parts` micro-batches."""
    run = jax.jit(lambda p, f, b: accumulated_gradients(loss, p, f, b, jax.random.key(0), parts))
    return run(params, frozen, on_device(batch))


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def tiny_decoder(rules: Rules) -> Decoder:
    config = dataclasses.replace(
        SIZES["miniature"], vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2, head_dim=8, max_positions=64
    )
    return Decoder(config, rules)


def one_device() -> Rules:
    return Rules(make_mesh(devices=jax.devices()[:1]))


@pytest.fixture
def tools():
    """The functions of this file: conftest modules cannot be imported by name."""
    import sys

    return sys.modules[__name__]
