"""Small things the objectives are tried on: packed batches, a language model that is also written in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dqjax.data.pack import Tokens, pack_items
from dqjax.models.config import SIZES
from dqjax.models.decoder import Decoder
from dqjax.sharding import Rules, make_mesh
from dqjax.steps.accumulate import accumulated_gradients

VOCAB, WIDTH, LONGEST = 23, 8, 32
QUICK = {"xla_backend_optimization_level": 0}  # tests compile far more than they compute


class Bigram:
    """hidden = tanh(embed[token] + place[position]); logits = hidden · tableᵀ. No memory, so torch needs no mask."""

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


def by_token(batch, values):
    """`[B, T, …]` array of the entries of `values[row]` (`[n, …]` a sequence), found by each sequence's `row`."""
    B, T = batch.tokens.shape
    out = np.zeros((B, T, *values[0].shape[1:]), values[0].dtype)
    for b, t in zip(*np.nonzero(batch.segment_ids)):
        out[b, t] = values[batch.side["row"][b, batch.sequence_index[b, t]]][batch.positions[b, t]]
    return out


def on_device(batch):
    """The batch as jax arrays; those that are stay where they lie."""
    return jax.tree.map(jnp.asarray, batch)


def value_and_grad(loss, params, batch, frozen=None, parts=1):
    """(gradients, value, metrics) of a loss on a batch, in `parts` micro-batches."""

    def run(params, frozen, batch):
        return accumulated_gradients(loss, params, frozen, batch, jax.random.key(0), parts)

    return jax.device_get(jax.jit(run, compiler_options=QUICK)(params, frozen, on_device(batch)))


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def tiny_decoder(rules: Rules) -> Decoder:
    config = dataclasses.replace(
        SIZES["miniature"], vocab_size=64, hidden_size=32, mlp_size=48, num_layers=2, head_dim=8, max_positions=64
    )
    return Decoder(config, rules)


def random_like(shapes, seed: int = 3) -> dict:
    """Parameters of these shapes, without compiling an initialiser; scales (of norms) near 1."""
    rng = np.random.default_rng(seed)

    def draw(path, s):
        centre = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.2 * rng.normal(size=s.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def one_device() -> Rules:
    return Rules(make_mesh(devices=jax.devices()[:1]))
