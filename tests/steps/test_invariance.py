"""Every objective gives the same loss, gradient and metrics whatever the packing, the micro-batches and the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.losses.ordinal import weigh_labels
from dqjax.losses.pairs import weigh_pairs
from dqjax.losses.policy_gradient import PolicyOptions
from dqjax.losses.reduce import weigh_tokens
from dqjax.models.heads import Classifier
from dqjax.sharding import Rules, make_mesh
from dqjax.steps.distill import CachedTeacher, make_distill_loss
from dqjax.steps.grpo import make_grpo_loss, weigh_samples
from dqjax.steps.preference import make_preference_loss
from dqjax.steps.reward import make_reward_loss
from dqjax.steps.scorer import LABELS, LEVELS, make_scorer_loss
from dqjax.types import Batch, LanguageModel, Loss
from tests.steps import tiny

SEED, PAIRS, LONGEST, K = 5, 5, 9, 6


@dataclasses.dataclass(frozen=True)
class Case:
    """How an objective is built on a mesh, and its batch from packed sequences."""

    make: Callable[[LanguageModel, Rules], Loss]
    weigh: Callable[[Batch], Batch]
    labels: int = 0  # a classifier's; 0: a language model
    frozen: Callable[[Any], Any] = lambda params: None

    def decoder(self, rules: Rules) -> LanguageModel:
        decoder = tiny.tiny_decoder(rules)
        return Classifier(decoder, self.labels) if self.labels else decoder

    def bigram(self) -> tiny.Bigram:
        return tiny.Bigram(self.labels or 64)


def _moved(params):
    """The parameters of another policy."""
    return jax.tree.map(lambda x: x * 1.1 + 0.02, params)


def _teacher_rows(batch: Batch) -> Batch:
    rng = np.random.default_rng(1)
    ids = [np.argsort(rng.random((40, 64)), axis=1)[:, :K].astype(np.int32) for _ in range(2 * PAIRS)]
    logprobs = [np.log(rng.dirichlet(np.ones(K + 1), 40)[:, :K]).astype(np.float32) for _ in range(2 * PAIRS)]
    side = {"teacher_ids": tiny.by_token(batch, ids), "teacher_logprobs": tiny.by_token(batch, logprobs)}
    return dataclasses.replace(weigh_tokens(batch, "token_mean"), side={**batch.side, **side})


def _per_token(batch: Batch) -> Batch:
    rng = np.random.default_rng(2)
    names = ("old_logprobs", "sample_logprobs", "reference_logprobs")
    draw = lambda: [-4.2 + rng.normal(size=40).astype(np.float32) * 0.2 for _ in range(2 * PAIRS)]  # noqa: E731
    side = {name: tiny.by_token(batch, draw()) for name in names}
    return dataclasses.replace(batch, side={**batch.side, **side})


CORRECTED = PolicyOptions(kl=0.1, correction="sequence_truncate", correction_high=1.1)
CASES = {
    "grpo": Case(
        lambda model, rules: make_grpo_loss(model, rules, CORRECTED, temperature=0.8),
        lambda batch: weigh_samples(_per_token(batch), "grpo", max_length=LONGEST, mask_truncated=True),
    ),
    "gspo": Case(
        lambda model, rules: make_grpo_loss(model, rules, PolicyOptions(ratio="sequence", kl=0.1), vocab=60),
        lambda batch: weigh_samples(_per_token(batch), "dapo", max_length=LONGEST),
    ),
    "reward": Case(
        lambda model, rules: make_reward_loss(
            model, centering=0.1, margin=True, length_edges=(-2, 2), groups={"source": 2}
        ),
        weigh_pairs,
        labels=1,
    ),
    "scorer": Case(
        lambda model, rules: make_scorer_loss(model),
        lambda batch: weigh_labels(batch, LABELS, classes=LEVELS),
        labels=len(LABELS) * LEVELS,
    ),
    "cogpo, cached reference": Case(
        lambda model, rules: make_preference_loss(model, rules, groups={"source": 2}), weigh_pairs
    ),
    "dpo, frozen reference": Case(
        lambda model, rules: make_preference_loss(
            model, rules, beta=2.0, length_normalised=True, reference="frozen", vocab=60
        ),
        weigh_pairs,
        frozen=lambda params: {"reference": _moved(params)},
    ),
    "distill, two teachers": Case(
        lambda model, rules: make_distill_loss(
            model, rules, [model, CachedTeacher()], weights=(0.3, 0.7), beta=0.4, temperature=1.5
        ),
        _teacher_rows,
        frozen=lambda params: {"teachers": (_moved(params),)},
    ),
    "distill, hinton": Case(
        lambda model, rules: make_distill_loss(model, rules, [model], temperature=2.0, hinton=0.4, vocab=60),
        lambda batch: weigh_tokens(batch, "sequence_mean"),
        frozen=lambda params: {"teachers": (_moved(params),)},
    ),
}


def make_batch(case: Case, *, row_length: int, rows: int, order: int = 0) -> Batch:
    """Ten sequences, five pairs of them, with every side value an objective may want, in rows of `row_length`."""
    rng = np.random.default_rng(SEED)
    made, items = tiny.sequences(SEED, 2 * PAIRS), []
    for pair in range(PAIRS):
        item = []
        for member in (0, 1):
            i = 2 * pair + member
            values = {
                "row": i,
                "pair_id": 7 * pair,
                "chosen": 1 - member,
                "source": pair % 2,
                "truncated": int(i == 3),
                "margin": 0.1 * pair,
                "beta": float(rng.choice([0.1, 0.2, 0.5])),
                "reference_logprob": float(rng.normal() - 20),
                "advantage": float(rng.normal()),
                "verbosity": int(rng.integers(-1, LEVELS)),
                "difficulty": float(rng.uniform(0, LEVELS - 1)),
            }
            item.append(tiny.tokens_of(*made[i], values))
        items.append(item)
    items = [items[i] for i in np.random.default_rng(order).permutation(PAIRS)] if order else items
    return case.weigh(tiny.pack(items, row_length, rows))


def run(case: Case, rules: Rules, batch: Batch, parts: int = 1):
    """(gradients, value, metrics) of a decoder on a mesh, with parameters and batch laid out by the rules."""
    model = case.decoder(rules)
    params = jax.device_put(tiny.random_like(model.shapes()), model.shardings())
    batch = jax.tree.map(lambda x: jax.device_put(x, rules.sharding(("batch",), x.shape[:1])), batch)
    return tiny.value_and_grad(case.make(model, rules), params, batch, case.frozen(params), parts)


@pytest.fixture(scope="module", params=CASES)
def whole(request):
    """A case, and its results in one batch on one device."""
    case = CASES[request.param]
    result = run(case, tiny.one_device(), make_batch(case, row_length=64, rows=4))
    assert max(np.abs(x).max() for x in jax.tree.leaves(result[0])) > 1e-3
    return case, result


def close(a, b):
    tiny.assert_trees_close(a, b, rtol=3e-5, atol=3e-6)


def test_packing_and_micro_batches(whole):
    """In other rows and another order, four rows of mostly one pair each at a time."""
    case, want = whole
    apart = make_batch(case, row_length=28, rows=8, order=1)
    assert (apart.segment_ids > 0).any(axis=1).sum() > 3
    close(run(case, tiny.one_device(), apart, parts=4), want)


def test_mesh_and_micro_batches(whole):
    """Eight devices, parameters and tables split over them."""
    case, want = whole
    rules = Rules(make_mesh(data=2, fsdp=2, tensor=2))
    close(run(case, rules, make_batch(case, row_length=64, rows=8), parts=2), want)


@pytest.mark.parametrize("name", CASES)
def test_nothing_to_learn(name):
    """With all weights 0 the loss and the gradients are 0, and all metrics are finite sums."""
    case = CASES[name]
    batch = make_batch(case, row_length=64, rows=4)
    side = {key: np.zeros_like(x) if "weight" in key else x for key, x in batch.side.items()}
    batch = dataclasses.replace(batch, token_weight=np.zeros_like(batch.token_weight), side=side)
    params, loss = case.bigram().init(1), case.make(case.bigram(), tiny.one_device())
    grads, value, metrics = tiny.value_and_grad(loss, params, batch, case.frozen(params))
    assert value == 0
    assert all((g == 0).all() for g in jax.tree.leaves(grads))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


@pytest.mark.parametrize("name", CASES)
def test_a_real_nan_is_seen(name):
    case = CASES[name]
    params, loss = case.bigram().init(1), case.make(case.bigram(), tiny.one_device())
    params = {**params, "place": params["place"].at[:, 0].set(jnp.nan)}
    batch = make_batch(case, row_length=64, rows=4)
    assert np.isnan(tiny.value_and_grad(loss, params, batch, case.frozen(params))[1])


@pytest.mark.parametrize("name", CASES)
def test_padding_and_prompts_hold_anything(name):
    """NaN in the per-token values of untrained places, and any token in padding, change nothing."""
    case = CASES[name]
    params, loss = case.bigram().init(1), case.make(case.bigram(), tiny.one_device())
    batch = make_batch(case, row_length=64, rows=4)
    want = tiny.value_and_grad(loss, params, batch, case.frozen(params))

    def spoil(key, x):
        untrained = batch.token_weight == 0
        return np.where(untrained, np.nan, x).astype(x.dtype) if key.endswith("_logprobs") and x.ndim == 2 else x

    spoilt = dataclasses.replace(
        batch,
        tokens=np.where(batch.segment_ids == 0, 5, batch.tokens),
        side={key: spoil(key, x) for key, x in batch.side.items()},
    )
    tiny.assert_trees_close(tiny.value_and_grad(loss, params, spoilt, case.frozen(params)), want, rtol=0, atol=0)
