"""GRPO: TRL's loss and gradient for every variant, hand arithmetic, and invariance."""

import collections
import types

import jax
import numpy as np
import pytest

from dqjax.losses.reduce import totals_of
from dqjax.steps.grpo import (
    GRPOConfig,
    make_fixed_logprobs,
    make_grpo_loss,
    make_token_logprobs,
    weigh_samples,
    weigh_updates,
)
from tests.steps import tiny

TEMPERATURE, LONGEST = 0.7, 12

VARIANTS = {
    "grpo": dict(loss="grpo"),
    "bnpo": dict(loss="bnpo"),
    "dr_grpo": dict(loss="dr_grpo"),
    "dapo, clip-higher": dict(loss="dapo", clip_high=0.28),
    "cispo": dict(loss="cispo", ratio_cap=1.2),
    "sapo": dict(loss="sapo"),
    "gspo": dict(loss="grpo", ratio="sequence", clip_low=0.03, clip_high=0.04),
    "gspo, kl corrected": dict(loss="dapo", ratio="sequence", clip_low=0.03, clip_high=0.04, kl=0.3),
    "two-sided clip": dict(loss="dapo", ratio_limit=1.5),
    "kl": dict(loss="grpo", kl=0.2, kl_corrected=False),
    "kl corrected": dict(loss="dr_grpo", kl=0.2),
    "token truncate": dict(loss="dapo", correction="token_truncate", correction_low=0.8, correction_high=1.2),
    "token mask": dict(loss="dapo", correction="token_mask", correction_low=0.8, correction_high=1.2),
    "sequence truncate": dict(loss="grpo", correction="sequence_truncate", correction_high=1.1),
    "sequence mask": dict(loss="dapo", correction="sequence_mask", correction_high=1.3, kl=0.1),
}


def make_samples(seed=0, count=6):
    """Samples with advantages, and the log-probabilities of three other policies at each token."""
    rng = np.random.default_rng(seed)
    made = []
    for ids, prompt in tiny.sequences(seed, count):
        near = lambda spread: rng.normal(size=len(ids)).astype(np.float32) * spread  # noqa: B023, E731
        made.append((ids, prompt, float(rng.normal()), near(0.3), near(0.2), near(0.5)))
    return made


def logprobs_of(params, ids):
    """log π of each token at the sampling temperature; 0 for the first. [n]"""
    at_policy, _ = tiny.torch_logprobs(tiny.torch_copy(params), ids, TEMPERATURE)
    return np.concatenate([[0], at_policy.detach().numpy()]).astype(np.float32)


def pack_samples(samples, params, truncated=(), row_length=32, rows=None, old=True):
    """The samples as a batch: old, sampled and reference log-probabilities are the policy's, moved a little."""
    items = []
    for i, (ids, prompt, advantage, d_old, d_sample, d_reference) in enumerate(samples):
        logp = logprobs_of(params, ids)
        per_token = {"sample_logprobs": logp + d_old + d_sample, "reference_logprobs": logp + d_reference}
        if old:
            per_token["old_logprobs"] = logp + d_old
        values = {"advantage": advantage, "truncated": int(i in truncated)}
        items.append([tiny.tokens_of(ids, prompt, values, per_token)])
    return tiny.pack(items, row_length, rows)


def trl_loss(samples, params, config: GRPOConfig, truncated=(), parts=1, tokens=None):
    """Value and gradients of `GRPOTrainer._compute_loss` on the same samples, padded: one of `parts` minibatches of a
    rollout that has `tokens` trained tokens."""
    import torch
    from trl import GRPOTrainer

    leaves = tiny.torch_copy(params)
    width = max(len(ids) - prompt for ids, prompt, *_ in samples)

    def padded(rows, dtype=torch.float32):
        rows = [torch.as_tensor(row, dtype=dtype) for row in rows]
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])

    def logps(self, model, input_ids, attention_mask, logits_to_keep, **_):
        both = [tiny.torch_logprobs(leaves, ids, TEMPERATURE) for ids, *_ in samples]
        rows = [[x[prompt - 1 :] for x in pair] for pair, (_, prompt, *_) in zip(both, samples)]
        return padded([r[0] for r in rows]), padded([r[1] for r in rows]), None

    at_policy, _, _ = logps(None, None, None, None, 0)
    at_policy = at_policy.detach()
    moved = lambda i: padded([s[i][s[1] :] for s in samples])  # noqa: E731
    old = at_policy + moved(3)
    mask = padded([np.ones(len(s[0]) - s[1]) * (i not in truncated) for i, s in enumerate(samples)])
    reference = at_policy + moved(5)
    ratio = None
    if config.correction != "none":
        level, action = config.correction.split("_")
        drift = -moved(4) * mask
        ratio = torch.exp(drift.sum(-1, keepdim=True) if level == "sequence" else drift)
        low, high = config.correction_low, config.correction_high
        if action == "truncate":
            ratio = torch.clamp(ratio, min=low, max=high)
        else:
            outside = (ratio < (-np.inf if low is None else low)) | (ratio > (np.inf if high is None else high))
            ratio = ratio.masked_fill(outside, 0.0)
    trainer = object.__new__(GRPOTrainer)
    trainer.model = types.SimpleNamespace(training=True)
    trainer.args = types.SimpleNamespace(
        delta=config.ratio_limit,
        use_bias_correction_kl=config.kl_corrected,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        steps_per_generation=parts,
    )
    trainer.accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer._get_per_token_logps_and_entropies = types.MethodType(logps, trainer)
    trainer._metrics = {"train": collections.defaultdict(list)}
    for name, value in {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": config.ratio,
        "beta": config.kl,
        "loss_type": config.loss,
        "epsilon_low": config.clip_low,
        "epsilon_high": config.ratio_cap if config.loss == "cispo" else config.clip_high,
        "use_vllm": ratio is not None,
        "vllm_importance_sampling_correction": ratio is not None,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": LONGEST,
        "_entropy_bonus_enabled": False,
    }.items():
        setattr(trainer, name, value)
    loss = trainer._compute_loss(
        None,
        {
            "prompt_ids": torch.zeros(len(samples), 1),
            "prompt_mask": torch.ones(len(samples), 1),
            "completion_ids": torch.zeros(len(samples), width),
            "completion_mask": mask,
            "advantages": torch.tensor([s[2] for s in samples]),
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
            "importance_sampling_ratio": ratio,
            "num_items_in_batch": mask.sum() if tokens is None else torch.tensor(float(tokens)),
        },
    )
    loss.backward()
    gradients = {name: x.grad.numpy() for name, x in leaves.items()}
    return loss.item(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def our_loss(batch, params, config, parts=1, mask_truncated=False):
    weighed = weigh_samples(batch, config.loss, max_length=LONGEST, mask_truncated=mask_truncated)
    loss = make_grpo_loss(tiny.Bigram(), tiny.one_device(), config.options(), temperature=TEMPERATURE)
    return tiny.value_and_grad(loss, params, weighed, parts=parts)


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradient_equal_trl(name):
    config, params = GRPOConfig(**VARIANTS[name]), tiny.Bigram().init(1)
    samples = make_samples()
    want, want_grads, want_metrics = trl_loss(samples, params, config, truncated={2})
    batch = pack_samples(samples, params, truncated={2})
    assert batch.tokens.shape[0] < len(samples)  # some rows hold several
    grads, value, metrics = our_loss(batch, params, config, mask_truncated=True)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
    tiny.assert_trees_close(grads, want_grads)
    ours = {k: float(m.total / m.count) for k, m in metrics.items() if hasattr(m, "total")}
    np.testing.assert_allclose(ours["entropy"], want_metrics["entropy"], rtol=1e-5)
    if config.kl:
        np.testing.assert_allclose(ours["kl"], want_metrics["kl"], rtol=1e-5)
    if config.loss not in ("cispo", "sapo") and config.ratio == "token":
        np.testing.assert_allclose(ours["clip_low"], want_metrics["clip_ratio/low_mean"], rtol=1e-5)
        np.testing.assert_allclose(ours["clip_high"], want_metrics["clip_ratio/high_mean"], rtol=1e-5)


def test_the_policy_that_sampled_needs_no_old_values():
    """Without `old_logprobs` the ratio is 1: as if the policy's own values had been stored."""
    params, config = tiny.Bigram().init(1), GRPOConfig(loss="grpo")
    samples = [(*s[:3], s[3] * 0, *s[4:]) for s in make_samples()]
    stored, none = (our_loss(pack_samples(samples, params, old=old), params, config) for old in (True, False))
    tiny.assert_trees_close(stored[:2], none[:2], rtol=1e-4, atol=1e-5)


def test_sampler_gap_is_the_largest_difference_over_trained_tokens():
    params, samples = tiny.Bigram().init(1), make_samples()
    _, _, metrics = our_loss(pack_samples(samples, params), params, GRPOConfig())
    want = max(np.abs(s[4][s[1] :]).max() for s in samples)
    np.testing.assert_allclose(metrics["sampler_gap"].value, want, rtol=1e-4)


def test_several_updates_of_a_rollout_share_its_token_count():
    """dapo divides by the rollout's mean tokens an update: together the parts are the whole; bnpo by the update's own."""
    params, samples = tiny.Bigram().init(1), make_samples(count=8)
    halves = [pack_samples(part, params) for part in (samples[:3], samples[3:])]
    whole = weigh_samples(pack_samples(samples, params), "dapo", max_length=LONGEST)
    parts = weigh_updates(halves, "dapo", max_length=LONGEST)
    loss = make_grpo_loss(tiny.Bigram(), tiny.one_device(), temperature=TEMPERATURE)
    grads = [tiny.value_and_grad(loss, params, batch)[0] for batch in (whole, *parts)]
    tiny.assert_trees_close(jax.tree.map(lambda a, b: (a + b) / 2, *grads[1:]), grads[0])
    for half, part in zip(halves, weigh_updates(halves, "bnpo", max_length=LONGEST), strict=True):
        np.testing.assert_allclose(part.token_weight.max(), 1 / totals_of(half).tokens, rtol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dapo, clip-higher", "gspo", "kl", "cispo"])
def test_two_passes_in_two_minibatches_take_trls_steps(name):
    """Four updates by plain gradient descent from one rollout: log π_old stays that of the policy that sampled."""
    config, before, rate = GRPOConfig(**VARIANTS[name]), tiny.Bigram().init(1), 0.5
    samples = [(*s[:3], s[3] * 0, *s[4:]) for s in make_samples(count=8)]
    halves = (samples[:4], samples[4:])
    batches = weigh_updates([pack_samples(half, before) for half in halves], config.loss, max_length=LONGEST)
    loss = make_grpo_loss(tiny.Bigram(), tiny.one_device(), config.options(), temperature=TEMPERATURE)
    tokens = sum(len(s[0]) - s[1] for s in samples)
    descend = lambda x, g: x - rate * g  # noqa: E731
    ours = theirs = before
    for k in (0, 1, 0, 1):
        gradients, _, metrics = tiny.value_and_grad(loss, ours, batches[k])
        ours = jax.tree.map(descend, ours, gradients)
        drifted = [
            (*s[:3], s[3] + drift, s[4], s[5] + drift)
            for s in halves[k]
            for drift in [logprobs_of(before, s[0]) - logprobs_of(theirs, s[0])]
        ]
        _, gradients, _ = trl_loss(drifted, theirs, config, parts=2, tokens=tokens)
        theirs = jax.tree.map(descend, theirs, gradients)
        tiny.assert_trees_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert metrics["ratio"].value > 1.01  # the policy has left the one that sampled


def test_token_logprobs_are_those_of_the_sampling_temperature():
    params, samples = tiny.Bigram().init(1), make_samples()
    batch = tiny.on_device(pack_samples(samples, params))
    logprob, entropy = make_token_logprobs(tiny.Bigram(), tiny.one_device(), temperature=TEMPERATURE)(params, batch)
    want = [tiny.torch_logprobs(tiny.torch_copy(params), s[0], TEMPERATURE) for s in samples]
    for ours, k in ((logprob, 0), (entropy, 1)):
        total = sum(float(w[k][s[1] - 1 :].detach().sum()) for w, s in zip(want, samples))
        np.testing.assert_allclose(ours.sum(), total, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(ratio_limit=1.1), "expected more than 1 . clip_high"),
        (dict(correction_low=4.0), "must lie under correction_high"),
        (dict(correction="token_truncate", correction_high=None), "needs correction_low or correction_high"),
        (dict(loss="ppo"), "loss"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**values)


def test_fixed_logprobs_do_not_depend_on_the_micro_batches():
    params, samples = tiny.Bigram().init(1), make_samples()
    batch = tiny.on_device(pack_samples(samples, params, rows=4))
    whole, _ = make_token_logprobs(tiny.Bigram(), tiny.one_device(), temperature=TEMPERATURE)(params, batch)
    for parts in (1, 2, 4):
        fixed = make_fixed_logprobs(tiny.Bigram(), tiny.one_device(), parts=parts, temperature=TEMPERATURE)
        np.testing.assert_allclose(fixed(params, batch), whole, rtol=1e-6)
