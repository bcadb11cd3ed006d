"""Scorers of verbosity and difficulty: torch's cross-entropy on soft labels, missing labels, summaries."""

import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.ordinal import weigh_labels
from dqjax.steps.scorer import LABELS, LEVELS, ScorerConfig, expected_levels, make_scorer_loss, summarise
from tests.steps import tiny

ROWS = LEVELS * len(LABELS)


def make_batch(labels, seed=0):
    made = tiny.sequences(seed, len(labels))
    values = [dict(zip(LABELS, pair)) for pair in labels]
    items = [[tiny.tokens_of(ids, 0, value)] for (ids, _), value in zip(made, values, strict=True)]
    return made, weigh_labels(tiny.pack(items), LABELS, classes=LEVELS)


def test_loss_and_gradient_equal_torch():
    """The sum of two means, each over the sequences that have its label; a label between levels is allowed."""
    import torch

    labels = [(3, 2.0), (-1, 7.5), (9, -1.0), (0, 0.0), (5, 9.0)]
    made, batch = make_batch(labels)
    params = tiny.Bigram(rows=ROWS).init(1)
    leaves = tiny.torch_copy(params)
    logits = torch.stack([tiny.torch_logits(leaves, ids)[-1] for ids, _ in made])
    want = 0
    for k in range(len(LABELS)):
        known = [i for i, pair in enumerate(labels) if pair[k] >= 0]
        y = torch.tensor([float(labels[i][k]) for i in known])
        q = torch.softmax(-((torch.arange(10) - y[:, None]) ** 2) / (2 * 0.5**2), dim=-1)
        want = want + torch.nn.functional.cross_entropy(logits[known, 10 * k : 10 * k + 10], q)
    want.backward()
    grads, value, metrics = tiny.value_and_grad(make_scorer_loss(tiny.Bigram(rows=ROWS)), params, batch)
    np.testing.assert_allclose(value, want.item(), rtol=1e-5)
    tiny.assert_trees_close(grads, {name: x.grad.numpy() for name, x in leaves.items()})
    assert metrics["loss_verbosity"].count == metrics["loss_difficulty"].count == 4
    parts = [metrics[f"loss_{name}"] for name in LABELS]
    np.testing.assert_allclose(sum(m.total / m.count for m in parts), want.item(), rtol=1e-5)
    kappas = summarise(metrics)
    assert set(kappas) == {"kappa_verbosity", "kappa_difficulty"} and all(-1 <= k <= 1 for k in kappas.values())
    assert summarise({}) == {}


def test_expected_levels():
    """All mass on one level gives that level; the order of the labels is that of the head's rows."""
    logits = jnp.full((1, 1, ROWS), -50.0).at[0, 0, 3].set(50.0).at[0, 0, 10 + 8].set(50.0)
    levels = expected_levels(logits)
    np.testing.assert_allclose([levels["verbosity"][0, 0], levels["difficulty"][0, 0]], [3, 8], rtol=1e-6)
    with pytest.raises(ValueError, match="20 rows, ten for each"):
        expected_levels(logits[..., :12])


def test_config():
    assert ScorerConfig().smoothing == 0.5
    with pytest.raises(ValueError, match="smoothing"):
        ScorerConfig(smoothing=-0.1)
