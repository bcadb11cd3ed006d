"""DPO and CogPO: TRL's loss and gradient, and the cases in which they are the same."""

import collections
import types

import numpy as np
import pytest

from dqjax.losses.pairs import weigh_pairs
from dqjax.steps.preference import PreferenceConfig, make_preference_loss, make_sequence_logprobs
from tests.steps import tiny


def make_pairs(seed=0, count=5):
    """((ids, prompt) chosen, (ids, prompt) rejected, beta) with a shared prompt."""
    rng = np.random.default_rng(seed)
    made = []
    for (chosen, prompt), (rejected, _) in zip(tiny.sequences(seed, count), tiny.sequences(seed + 1, count)):
        rejected = np.concatenate([chosen[:prompt], rejected])
        made.append(((chosen, prompt), (rejected, prompt), float(rng.choice([0.1, 0.2, 0.5]))))
    return made


def pack_pairs(pairs, reference=None, row_length=40, rows=None, beta=None):
    """The pairs as a batch; `reference` are the parameters whose log-probabilities are cached."""
    items = []
    for i, (chosen, rejected, own_beta) in enumerate(pairs):
        item = []
        for side, (ids, prompt) in ((1, chosen), (0, rejected)):
            values = {"pair_id": i, "chosen": side, "beta": own_beta if beta is None else beta, "gap": i % 3}
            if reference is not None:
                logp, _ = tiny.torch_logprobs(tiny.torch_copy(reference), ids)
                values["reference_logprob"] = logp[prompt - 1 :].sum().item()
            item.append(tiny.tokens_of(ids, prompt, values))
        items.append(item)
    return weigh_pairs(tiny.pack(items, row_length, rows))


def trl_loss(pairs, params, reference, beta, kind):
    """Value, gradients and metrics of `DPOTrainer.compute_loss` on the padded pairs."""
    import torch
    from trl import DPOTrainer

    leaves, fixed = tiny.torch_copy(params), tiny.torch_copy(reference)
    both = [side for k in (0, 1) for side in [p[k] for p in pairs]]
    width = max(len(ids) for ids, _ in both)
    mask = torch.tensor([[int(prompt <= t < len(ids)) for t in range(width)] for ids, prompt in both])

    def outputs(leaves):
        rows = []
        for ids, prompt in both:
            logp, _ = tiny.torch_logprobs(leaves, ids)
            logp = torch.where(torch.arange(len(logp)) >= prompt - 1, logp, 0.0)
            rows.append(torch.nn.functional.pad(logp, (0, width - 1 - len(logp))))
        logps = torch.stack(rows)
        zeros = torch.zeros_like(logps)
        return types.SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    trainer = object.__new__(DPOTrainer)
    trainer.model = types.SimpleNamespace(training=True)
    trainer.accelerator = types.SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    trainer.args = types.SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": collections.defaultdict(list)}, 0, 1
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.ld_alpha, trainer.f_divergence_type, trainer.beta = None, "reverse_kl", beta
    trainer.loss_types, trainer.loss_weights = [kind], [1.0]
    trainer.precompute_ref_logps = True
    with torch.no_grad():
        chosen, rejected = outputs(fixed).log_probs.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trainer.compute_loss(lambda **_: outputs(leaves), inputs)
    loss.backward()
    gradients = {name: x.grad.numpy() for name, x in leaves.items()}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(("kind", "beta"), [("sigmoid", 0.1), ("sigmoid", 0.7), ("sigmoid_norm", 5.0)])
@pytest.mark.parametrize("reference", ["cached", "frozen"])
def test_dpo_equals_trl(kind, beta, reference):
    model = tiny.Bigram()
    params, other, pairs = model.init(1, 0.5), model.init(2, 0.5), make_pairs()
    want, want_grads, want_metrics = trl_loss(pairs, params, other, beta, kind)
    loss = make_preference_loss(
        model, tiny.one_device(), beta=beta, length_normalised=kind == "sigmoid_norm", reference=reference
    )
    batch = pack_pairs(pairs, other if reference == "cached" else None)
    grads, value, metrics = tiny.value_and_grad(loss, params, batch, {"reference": other})
    np.testing.assert_allclose(value, want, rtol=1e-5)
    tiny.assert_trees_close(grads, want_grads)
    got = {name: float(m.total / m.count) for name, m in metrics.items()}
    np.testing.assert_allclose(got["logprob_chosen"], want_metrics["logps/chosen"], rtol=1e-5)
    if kind == "sigmoid":
        np.testing.assert_allclose(got["accuracy"], want_metrics["rewards/accuracies"])
        np.testing.assert_allclose(got["margin"], want_metrics["rewards/margins"], rtol=1e-4)


def test_cogpo_with_equal_betas_is_dpo():
    model = tiny.Bigram()
    params, other, pairs = model.init(1, 0.5), model.init(2, 0.5), make_pairs()
    batch = pack_pairs(pairs, other, beta=0.3)
    dpo = make_preference_loss(model, tiny.one_device(), beta=0.3)
    cogpo = make_preference_loss(model, tiny.one_device())
    a, b = (tiny.value_and_grad(loss, params, batch) for loss in (dpo, cogpo))
    tiny.assert_trees_close(a[:2], b[:2], rtol=1e-6)


def test_betas_of_pairs_scale_their_own_gradients():
    """One pair a batch: CogPO is DPO with that pair's β; the mean over pairs is the mean of theirs."""
    model = tiny.Bigram()
    params, other, pairs = model.init(1, 0.5), model.init(2, 0.5), make_pairs(3)
    cogpo = make_preference_loss(model, tiny.one_device())
    _, whole, _ = tiny.value_and_grad(cogpo, params, pack_pairs(pairs, other))
    alone = [trl_loss([pair], params, other, pair[2], "sigmoid")[0] for pair in pairs]
    np.testing.assert_allclose(whole, np.mean(alone), rtol=1e-5)


def test_cached_reference_values():
    """What `make_sequence_logprobs` gives is what the frozen reference would have said: at the start all is at ln 2."""
    model = tiny.Bigram()
    params, pairs = model.init(1, 0.5), make_pairs()
    batch = pack_pairs(pairs, params)
    cached = make_sequence_logprobs(model, tiny.one_device())(params, tiny.on_device(batch))
    present = batch.side["pair_id"] >= 0
    np.testing.assert_allclose(np.asarray(cached)[present], batch.side["reference_logprob"][present], rtol=1e-5)
    _, value, metrics = tiny.value_and_grad(make_preference_loss(model, tiny.one_device(), beta=0.5), params, batch)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-4)


def test_accuracy_by_gap():
    model = tiny.Bigram()
    loss = make_preference_loss(model, tiny.one_device(), groups={"gap": 3})
    batch = pack_pairs(make_pairs(), model.init(2))
    _, _, metrics = tiny.value_and_grad(loss, model.init(1), batch)
    by_gap = metrics["accuracy_by_gap"]
    np.testing.assert_array_equal(by_gap.count, [2, 2, 1])
    assert by_gap.total.sum() == metrics["accuracy"].total


def test_config():
    assert (PreferenceConfig().loss, PreferenceConfig().beta) == ("cogpo", 0.1)
    with pytest.raises(ValueError, match="beta"):
        PreferenceConfig(beta=0)
