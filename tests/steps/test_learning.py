"""Every objective, through the real training step, learns what it says it teaches; and none holds logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dqjax.losses.advantages import group_advantages
from dqjax.losses.distillation import head_divergence, top_k_divergence
from dqjax.losses.logprob import token_logprobs
from dqjax.losses.ordinal import weigh_labels
from dqjax.losses.pairs import weigh_pairs
from dqjax.losses.reduce import weigh_tokens
from dqjax.steps.distill import make_distill_loss
from dqjax.steps.grpo import make_grpo_loss, weigh_samples
from dqjax.steps.preference import make_preference_loss, make_sequence_logprobs
from dqjax.steps.reward import make_reward_loss
from dqjax.steps.scorer import LABELS, LEVELS, make_scorer_loss
from dqjax.steps.state import init_state, state_shardings
from dqjax.steps.update import make_step
from dqjax.types import Batch, Loss, Mean
from tests.steps import tiny

GOOD = 7  # the token that good answers are made of


def answers(rng, count: int, good: bool) -> list[np.ndarray]:
    """Prompts of two tokens and answers of five that hold `GOOD` often and at the end, or never."""
    others = np.delete(np.arange(tiny.VOCAB), GOOD)
    made = rng.choice(others, (count, 7)).astype(np.int32)
    if good:
        made[:, 2:] = np.where(rng.random((count, 5)) < 0.8, GOOD, made[:, 2:])
        made[:, -1] = GOOD
    return list(made)


def train(loss: Loss, params, batches: Callable[[int], Batch], steps: int, frozen=None, rate: float = 0.03):
    """(parameters, metrics of the last step)."""
    optimizer = optax.adam(rate)
    mesh = tiny.one_device().mesh
    here = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params)
    state = init_state(params, optimizer, 0, state_shardings(optimizer, params, here))
    step = jax.jit(make_step(loss, optimizer, accumulate=2), compiler_options=tiny.QUICK)
    for n in range(steps):
        state, metrics = step(state, frozen, tiny.on_device(batches(n)))
        assert metrics["skipped"].total == 0
    means = {name: m for name, m in metrics.items() if isinstance(m, Mean) and m.total.ndim == 0}
    return state.params, {name: float(m.total / m.count) for name, m in means.items()}


def pairs(n: int, reference=None) -> Batch:
    rng = np.random.default_rng(n)
    items = []
    for i, (chosen, rejected) in enumerate(zip(answers(rng, 8, True), answers(rng, 8, False))):
        item = []
        for side, ids in ((1, chosen), (0, rejected)):
            item.append(tiny.tokens_of(ids, 2, {"pair_id": i, "chosen": side, "beta": 0.5}))
        items.append(item)
    return weigh_pairs(tiny.pack(items, 28, rows=4))


def test_reward_model_ranks_held_out_pairs():
    model = tiny.Bigram(rows=1)
    params, _ = train(make_reward_loss(model), model.init(0, 0.1), pairs, 40)
    _, _, metrics = tiny.value_and_grad(make_reward_loss(model), params, pairs(1000))
    assert metrics["accuracy"].total / metrics["accuracy"].count >= 0.9


@pytest.mark.parametrize("beta", [None, 0.5], ids=["cogpo", "dpo"])
def test_preference_widens_the_margin(beta):
    model, rules = tiny.Bigram(), tiny.one_device()
    start = model.init(0, 0.1)
    loss = make_preference_loss(model, rules, beta=beta, reference="frozen")
    params, last = train(loss, start, pairs, 30, {"reference": start})
    assert last["accuracy"] >= 0.9 and last["margin"] > 1
    before, after = (make_sequence_logprobs(model, rules)(p, tiny.on_device(pairs(1000))) for p in (start, params))
    assert float(jnp.mean((after - before)[:, ::2])) > float(jnp.mean((after - before)[:, 1::2]))


def test_scorer_learns_its_labels():
    """Verbosity is told by the last token; difficulty is missing half the time."""
    model = tiny.Bigram(rows=LEVELS * len(LABELS))

    def batches(n):
        rng = np.random.default_rng(n)
        items = []
        for i, (ids, _) in enumerate(tiny.sequences(n, 16)):
            level = int(ids[-1]) * LEVELS // tiny.VOCAB
            labels = {"verbosity": level, "difficulty": level if rng.random() < 0.5 else -1}
            items.append([tiny.tokens_of(ids, 0, labels)])
        return weigh_labels(tiny.pack(items, rows=8), LABELS, classes=LEVELS)

    _, last = train(make_scorer_loss(model, smoothing=0.0), model.init(0, 0.3), batches, 120)
    assert last["absolute_error_verbosity"] < 1 and last["absolute_error_difficulty"] < 1.5


def test_distillation_approaches_the_teacher():
    model = tiny.Bigram()
    teacher = model.init(9)

    def batches(n):
        items = [[tiny.tokens_of(ids, p)] for ids, p in tiny.sequences(n, 8)]
        return weigh_tokens(tiny.pack(items, rows=4), "token_mean")

    loss = make_distill_loss(model, tiny.one_device(), [model])
    frozen = {"teachers": (teacher,)}
    start = model.init(0)
    before = tiny.value_and_grad(loss, start, batches(1000), frozen)[1]
    params, _ = train(loss, start, batches, 60, frozen)
    assert tiny.value_and_grad(loss, params, batches(1000), frozen)[1] < 0.5 * before


@pytest.mark.parametrize("objective", ["grpo", "dr_grpo", "dapo", "cispo", "sapo"])
def test_policy_earns_more(objective):
    """Groups sampled from the current policy; the reward counts `GOOD`; the sampler's values are checked each step."""
    model, groups, size, length = tiny.Bigram(), 4, 8, 5
    loss = make_grpo_loss(model, tiny.one_device())
    earned, current = [], {"params": model.init(0, 0.1)}

    @jax.jit
    def sample(params, key):
        first = jnp.tile(jnp.arange(1, groups + 1)[:, None], (1, size)).reshape(-1)
        columns, logprobs = [first], [jnp.zeros(groups * size)]
        for t in range(length):
            hidden, _ = model.apply(params, columns[-1], jnp.full(groups * size, t), None)
            logp = jax.nn.log_softmax(hidden @ params["table"].T)
            columns.append(jax.random.categorical(jax.random.fold_in(key, t), logp))
            logprobs.append(jnp.take_along_axis(logp, columns[-1][:, None], axis=1)[:, 0])
        return jnp.stack(columns, 1), jnp.stack(logprobs, 1)

    def batches(n):
        tokens, logprobs = jax.device_get(sample(current["params"], jax.random.key(n)))
        rewards = (tokens[:, 1:] == GOOD).mean(1).reshape(groups, size)
        earned.append(rewards.mean())
        advantages = group_advantages(rewards).reshape(-1)
        items = [
            [tiny.tokens_of(ids, 1, {"advantage": float(a)}, {"sample_logprobs": lp})]
            for ids, a, lp in zip(tokens, advantages, logprobs)
        ]
        return weigh_samples(tiny.pack(items, 24, rows=8), objective, max_length=length)

    optimizer = optax.adam(0.05)
    here = jax.tree.map(lambda _: NamedSharding(tiny.one_device().mesh, PartitionSpec()), current["params"])
    state = init_state(current["params"], optimizer, 0, state_shardings(optimizer, current["params"], here))
    step = jax.jit(make_step(loss, optimizer), compiler_options=tiny.QUICK)
    for n in range(30):
        state, metrics = step(state, None, tiny.on_device(batches(n)))
        current["params"] = state.params
        assert metrics["sampler_gap"].value < 1e-4
    assert np.mean(earned[-5:]) > 0.5 > 4 * np.mean(earned[:3])


SHAPES = {"B": 8, "T": 2048, "D": 64, "V": 65536, "K": 32}


@pytest.mark.parametrize("objective", ["logprob", "teacher", "top_k"])
def test_no_full_logits(objective):
    """Compiled forward and backward of 16384 tokens on 65536 entries stay far under the logits' four gigabytes."""
    B, T, D, V, K = SHAPES.values()
    rules = tiny.one_device()
    f32, i32 = (lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)), (lambda *s: jax.ShapeDtypeStruct(s, jnp.int32))
    rest = {
        "logprob": (i32(B, T), f32(B, T)),
        "teacher": (f32(B, T, D), f32(V, D), f32(B, T)),
        "top_k": (i32(B, T, K), f32(B, T, K), f32(B, T)),
    }[objective]

    def loss(hidden, table, *rest):
        if objective == "logprob":
            logprob, entropy = token_logprobs(hidden, table, rest[0], rest[1] != 0, rules)
            return jnp.sum(rest[1] * (jnp.exp(logprob) + entropy))
        f = head_divergence if objective == "teacher" else top_k_divergence
        return f(hidden, table, *rest, rules, beta=0.5)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(f32(B, T, D), f32(V, D), *rest).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.25 * B * T * V * 4
