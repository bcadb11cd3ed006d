"""Reward models: TRL's loss and gradient, packed pairs, metrics, the head."""

import collections
import types

import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.pairs import weigh_pairs
from dqjax.steps.reward import RewardConfig, length_names, make_reward_loss, summarise
from tests.steps import tiny


def make_pairs(seed=0, count=5):
    """(chosen ids, rejected ids, margin) of random pairs."""
    rng = np.random.default_rng(seed)
    ids = [ids for ids, _ in tiny.sequences(seed, 2 * count)]
    return [(c, r, float(rng.uniform(0, 0.5))) for c, r in zip(ids[::2], ids[1::2])]


def pack_pairs(pairs, row_length=32, rows=None):
    items = [
        [
            tiny.tokens_of(ids, 0, {"pair_id": 100 + i, "chosen": chosen, "margin": margin, "source": i % 2})
            for chosen, ids in ((1, c), (0, r))
        ]
        for i, (c, r, margin) in enumerate(pairs)
    ]
    return weigh_pairs(tiny.pack(items, row_length, rows))


def trl_loss(pairs, params, centering, margin):
    """Value, gradients and metrics of `RewardTrainer.compute_loss`; its model gives our scores of the padded batch."""
    import torch
    from trl import RewardTrainer

    leaves = tiny.torch_copy(params)
    scores = torch.stack([tiny.torch_logits(leaves, ids)[-1] for side in (0, 1) for ids in [p[side] for p in pairs]])
    trainer = object.__new__(RewardTrainer)
    trainer.model = types.SimpleNamespace(training=True)
    trainer.args = types.SimpleNamespace(center_rewards_coefficient=centering)
    trainer.accelerator = types.SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": collections.defaultdict(list)}, 0, 1
    inputs = {"attention_mask": torch.ones(1)}
    margins = {"margin": torch.tensor([p[2] for p in pairs])} if margin else {}
    loss = trainer.compute_loss(lambda **_: types.SimpleNamespace(logits=scores), inputs | margins)
    loss.backward()
    gradients = {name: x.grad.numpy() for name, x in leaves.items()}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(("centering", "margin"), [(0.0, False), (0.05, False), (0.0, True), (0.05, True)])
def test_loss_and_gradient_equal_trl(centering, margin):
    model = tiny.Bigram(rows=1)
    params, pairs = model.init(3), make_pairs()
    want, want_grads, want_metrics = trl_loss(pairs, params, centering, margin)
    loss = make_reward_loss(model, centering=centering, margin=margin)
    grads, value, metrics = tiny.value_and_grad(loss, params, pack_pairs(pairs))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    tiny.assert_trees_close(grads, want_grads)
    for ours, theirs in (("accuracy", "accuracy"), ("margin", "margin"), ("score", "mean_reward")):
        got = float(metrics[ours].total / metrics[ours].count)
        np.testing.assert_allclose(got, want_metrics[theirs], rtol=1e-5, atol=1e-6)


def test_accuracy_by_length_and_source():
    """A model that scores by length alone is right where the longer answer was chosen, and nowhere else."""
    model = tiny.Bigram(rows=1)
    params = model.init(0)
    # One hidden unit that grows with the position, read by the head: the score is the length.
    steps = jnp.linspace(-1, 1, tiny.LONGEST)
    params = {
        "embed": jnp.zeros_like(params["embed"]),
        "place": jnp.zeros_like(params["place"]).at[:, 0].set(steps),
        "table": jnp.zeros_like(params["table"]).at[0, 0].set(1.0),
    }
    ids = np.arange(20)
    pairs = [(ids[:n], ids[:m], 0.0) for n, m in [(12, 4), (4, 12), (5, 4), (4, 5), (20, 2)]]
    loss = make_reward_loss(model, length_edges=(-4, 0, 4), groups={"source": 2})
    _, _, metrics = tiny.value_and_grad(loss, params, pack_pairs(pairs))
    by_length, by_source = metrics["accuracy_by_length"], metrics["accuracy_by_source"]
    np.testing.assert_array_equal(by_length.count, [1, 1, 1, 2])
    np.testing.assert_array_equal(by_length.total, [0, 0, 1, 2])
    np.testing.assert_array_equal(by_source.count, [3, 2])
    np.testing.assert_array_equal(by_source.total, [3, 0])
    assert length_names((-4, 0, 4)) == ("below_-4", "-4_to_0", "0_to_4", "from_4")
    assert 0 < summarise(metrics)["calibration_error"] < 1 and summarise({}) == {}


def test_config():
    config = RewardConfig()
    assert (config.kind, config.centering, config.margin) == ("reward", 0.0, False)
    with pytest.raises(ValueError, match="centering"):
        RewardConfig(centering=-1)
    with pytest.raises(ValueError, match="length_edges: expected rising numbers"):
        RewardConfig(length_edges=(5, 5))
