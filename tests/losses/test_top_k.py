"""The most likely tokens: torch's log-softmax and top-k, in chunks and over a vocabulary that is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses import top_k
from dqjax.losses.top_k import top_k_logprobs
from dqjax.sharding import Rules, make_mesh
from tests.steps import tiny

torch = pytest.importorskip("torch")

B, T, D, V, K = 4, 5, 8, 24, 6


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)


def expected(hidden, table, vocab, temperature, k):
    logits = torch.as_tensor(hidden) @ torch.as_tensor(table).T / temperature
    best = torch.log_softmax(logits[..., :vocab], -1).topk(k)
    tail = torch.log1p(-best.values.exp().sum(-1).clamp(max=1 - 1e-7))
    return best.indices.numpy(), best.values.numpy(), tail.numpy()


@pytest.mark.parametrize(("vocab", "temperature"), [(None, 1.0), (V - 3, 2.5)])
@pytest.mark.parametrize("mesh", [{}, {"data": 2, "tensor": 4}], ids=["one", "split"])
def test_equals_torch(vocab, temperature, mesh, monkeypatch):
    monkeypatch.setattr(top_k, "_LOGITS", 3 * V)  # several chunks, the last not full
    rules = Rules(make_mesh(**mesh)) if mesh else tiny.one_device()
    hidden, table = inputs()
    options = {"k": K, "temperature": temperature, "vocab": vocab}
    ids, logprobs, tail = jax.jit(lambda x, w: top_k_logprobs(x, w, rules, **options))(hidden, table)
    want_ids, want_logprobs, want_tail = expected(hidden, table, vocab or V, temperature, K)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tail, want_tail, rtol=1e-4)


def test_more_tokens_than_there_are_is_refused():
    hidden, table = map(jnp.asarray, inputs())
    with pytest.raises(ValueError, match="expected k from 1 to 20"):
        top_k_logprobs(hidden, table, tiny.one_device(), k=21, vocab=20)
