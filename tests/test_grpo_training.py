"""Training on a policy's own samples: what a run leaves behind, its resumption, and its bounds."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest

from dqjax import train
from dqjax.commands import run_command
from dqjax.data.chat import parse_response
from dqjax.data.records import Message, Record
from dqjax.objectives import grpo
from dqjax.objectives.groups import Groups, PolicyConfig, Question
from dqjax.rewards.mix import Mix
from dqjax.rollout.engine import Sample
from tests.test_train import curve, parameters
from tests.workspace import DEBUG, make_workspace, overrides

GRPO = str(DEBUG / "grpo.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def run(workspace, name, *more):
    return run_command(lambda: train.main(["--config", GRPO, *overrides(workspace, name, *more)]))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(workspace):
    assert run(workspace, "whole", "train.steps=3", "checkpoint.every=1", "objective.table=2") == 0
    return workspace / "whole"


def test_a_run_logs_what_was_sampled(whole):
    steps = [row for row in lines(whole / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert 0 < row["sampler_gap"] < 1e-4  # the sampler and the trainer are one graph in float32
        assert row["ratio"] == row["inverse_ratio"] == 1  # one update a batch: the policy is the one that sampled
        assert row["reward"] == pytest.approx(row["reward/correct"] + row["reward/overlong"])
        assert row["accuracy"] == row["reward/correct"]
        assert 1 <= row["response_tokens"] <= 64 and 0 <= row["truncated"] <= 1
        assert row["trained_tokens"] == row["response_tokens"] * 16
        assert row["seconds/generate"] > 0 and row["seconds/reward"] > 0 and "seconds/logp" not in row
        assert row["seconds/update"] > 0
        assert row["gradient_norm"] > 0
    (evaluated,) = [row for row in lines(whole / "metrics.jsonl") if "eval/accuracy" in row and row["step"] == 2]
    assert 0 <= evaluated["eval/accuracy"] <= 1
    assert evaluated["eval/reward"] == pytest.approx(evaluated["eval/reward/correct"] + evaluated["eval/reward/overlong"])


def test_samples_are_written_with_their_rewards(whole):
    rows = lines(whole / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [step for step in (1, 2, 3) for _ in range(2 * 4)]
    assert len({row["id"] for row in rows}) == 6  # an epoch asks each problem once
    for row in rows:
        assert row["tokens"] == 64 or not row["truncated"]
        assert row["reward"] <= -row["tokens"] / 64 + 1 + 1e-6
    for group in np.array([row["advantage"] for row in rows]).reshape(-1, 4):
        assert abs(group.sum()) < 1e-5


def test_a_resumed_run_samples_what_the_whole_one_did(workspace, whole):
    """Bit for bit: the curve, the samples, and the last state."""
    more = ("train.steps=3", "objective.table=2", "checkpoint.every=1", "checkpoint.keep=3")
    stopped = workspace / "stopped"
    assert run(workspace, "stopped", *more) == 0
    for later in sorted((stopped / "checkpoints").glob("step_*"))[1:]:
        later.rename(workspace / f"removed-{later.name}")
    assert run(workspace, "stopped", *more) == 0
    assert curve(stopped) == curve(whole)
    assert (stopped / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    for a, b in zip(parameters(stopped)[1], parameters(whole)[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_sampler_that_disagrees_stops_the_run(workspace, capsys):
    assert run(workspace, "gap", "objective.max_sampler_gap=1e-12") == 1
    assert "step 1: sampler_gap is" in capsys.readouterr().err
    assert not list((workspace / "gap" / "checkpoints").glob("step_*"))


def test_the_reference_is_where_the_run_began(workspace):
    assert run(workspace, "kl", "objective.kl=0.04", "objective.max_sampler_gap=null", "train.sample_tokens=0") == 0
    rows = lines(workspace / "kl" / "metrics.jsonl")
    first, second = (row["kl"] for row in rows if "kl" in row)
    assert first < 1e-12 < second  # at first the two differ by rounding alone
    assert any("eval/accuracy" in row for row in rows)  # held-out problems, without a sample to show


REUSED = ("train.steps=8", "objective.minibatches=2", "objective.passes=2", "data.validation=null")


def test_a_rollout_feeds_several_updates(workspace):
    """Samples and their old log-probabilities stay; a run stopped in the middle saves behind the rollout, and goes on."""
    assert run(workspace, "reused", *REUSED, "checkpoint.every=3", "checkpoint.keep=9") == 0
    folder = workspace / "reused"
    assert [p.name for p in sorted((folder / "checkpoints").glob("step_*"))] == ["step_00000004", "step_00000008"]
    steps = [row for row in lines(folder / "metrics.jsonl") if "loss" in row]
    assert ["seconds/generate" in row and "seconds/logp" in row for row in steps] == [True, False, False, False] * 2
    assert steps[0]["ratio"] == pytest.approx(1, abs=1e-4) and steps[3]["ratio"] > 1.001
    assert all(row["sampler_gap"] < 1e-4 for row in steps)  # of the policy that sampled, not of the one that moved on
    passes = [row["trained_tokens"] for row in steps]
    assert passes[:2] == passes[2:4] and passes[4:6] == passes[6:]
    assert sum(passes[:2]) == steps[0]["response_tokens"] * 16
    (folder / "checkpoints" / "step_00000008").rename(workspace / "removed-reused")
    assert run(workspace, "reused", *REUSED, "checkpoint.every=3", "checkpoint.keep=9") == 0
    resumed = [row for row in lines(folder / "metrics.jsonl") if "loss" in row]
    assert [(row["loss"], row["gradient_norm"]) for row in resumed] == [
        (row["loss"], row["gradient_norm"]) for row in steps
    ]


def test_a_correction_weighs_by_the_sampler(workspace, monkeypatch):
    """A sampler that reports twice the probability of every token: weights of 1/2, and half the gradient."""
    generate = grpo.Engine.generate

    def doubled(self, params, prompts):
        for sample in generate(self, params, prompts):
            yield dataclasses.replace(sample, logprobs=tuple(x + math.log(2) for x in sample.logprobs))

    monkeypatch.setattr(grpo.Engine, "generate", doubled)
    more = ("train.steps=1", "objective.max_sampler_gap=null", "data.validation=null", "optimizer.clip_norm=null")
    rows = []
    for correction in ("none", "token_truncate"):
        assert run(workspace, f"correction-{correction}", *more, f"objective.correction={correction}") == 0
        rows += lines(workspace / f"correction-{correction}" / "metrics.jsonl")
    plain, corrected = rows
    assert plain["sampler_gap"] == pytest.approx(math.log(2), abs=1e-4) and "correction" not in plain
    assert corrected["correction"] == pytest.approx(0.5, abs=1e-4)
    assert corrected["gradient_norm"] == pytest.approx(plain["gradient_norm"] / 2, rel=1e-3)


def test_the_best_checkpoint_is_kept(workspace, monkeypatch):
    accuracy = iter([0.25, 0.75, 0.5, 0.25])
    monkeypatch.setattr(grpo, "measure_policy", lambda *_, **__: lambda *_, **__: ({"accuracy": next(accuracy)}, {}))
    more = ("train.steps=4", "train.eval_every=1", "train.sample_tokens=0", "checkpoint.every=1", "checkpoint.keep=1")
    assert run(workspace, "best", *more) == 0
    kept = sorted(p.name for p in (workspace / "best" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000004"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.thinking=on", "data.thinking: nothing to objective grpo"),
        ("data.row_length=66", "hold no prompt"),
        ("objective.prompts=100000", "objective.prompts: 100000 problems a rollout"),
        ("objective.reward.verbosity={weight: 0.1}", "objective.reward.style.scorer: verbosity needs a run folder"),
        ("objective.group_size=1", "objective.group_size"),
        ("objective.passes=3", "train.steps: 2 updates are no whole number of rollouts, which feed 3 each"),
        ("objective.minibatches=17", "objective.minibatches: 17 parts of 16 samples"),
        ("objective.reward.correct=null", "objective.best: accuracy is not graded"),
        ("objective.temprature=1", "objective.temprature: unknown key; did you mean temperature?"),
    ],
)
def test_bad_configuration_stops_before_anything_is_compiled(workspace, capsys, monkeypatch, override, message):
    monkeypatch.setattr(train, "make_step", lambda *_, **__: pytest.fail("reached compilation"))
    assert run(workspace, "bad", override) == 2
    assert message in capsys.readouterr().err


class Engine:
    """Completions of 1 to 4 tokens: as many as the seed says for the problems in `varied`, else two."""

    def __init__(self, varied):
        self.varied, self.seeds = varied, []

    def generate(self, params, prompts):
        for prompt in prompts:
            self.seeds.append(prompt.seed)
            n = 1 + prompt.seed % 4 if prompt.token_ids[0] in self.varied else 2
            yield Sample(tuple(range(50, 50 + n)), tuple(-0.5 - i for i in range(n)), "stop")


def make_groups(folder, varied, *, problems=6, seed=0, values=None, **config):
    chat = types.SimpleNamespace(
        tokenizer=types.SimpleNamespace(decode=str), parse=lambda text, thinking: parse_response(text), opens_block=False
    )
    questions = [
        Question(Record(id=str(i), messages=(Message("user", f"question {i}"),), problem=str(i)), (i, 40, 41))
        for i in range(problems)
    ]
    reward = {"correct": None, "overlong": {"weight": 1.0}, "overlong_punishment": {"limit": 4, "buffer": 4}}
    config = PolicyConfig(prompts=2, group_size=4, max_new_tokens=4, reward=reward, **config)
    shape = {"row_length": 16, "row_multiple": 4}
    return Groups(questions, Engine(varied), chat, Mix(config.reward), config, seed=seed, table=folder / "table.jsonl", values=values, **shape)


def step(n):
    return types.SimpleNamespace(step=n, params=None)


def test_a_batch_of_groups(tmp_path):
    source = make_groups(tmp_path, varied=set(range(6)))
    batch = source.next(step(0), None)
    sampled = batch.token_weight != 0
    assert sampled.sum() == 2 * (1 + 2 + 3 + 4)
    assert batch.token_weight.sum() == pytest.approx(1)
    assert (batch.targets[sampled] >= 50).all() and (batch.targets[~sampled] < 50).all()
    np.testing.assert_array_equal(batch.side["sample_logprobs"][sampled], -0.5 - (batch.targets[sampled] - 50))
    assert not batch.side["sample_logprobs"][~sampled].any()
    assert abs(batch.side["advantage"].sum()) < 1e-5 and len(np.unique(batch.side["advantage"])) == 5  # four, and the 0 of empty columns
    assert len(batch.tokens) % 4 == 0


def test_an_epoch_asks_each_problem_once_and_seeds_no_sample_twice(tmp_path):
    source = make_groups(tmp_path, varied=set(range(6)))
    for n in range(6):
        source.next(step(n), None)
    assert source._engine.seeds == list(range(6 * 2 * 4))
    asked = [row["id"] for row in lines(tmp_path / "table.jsonl")][::4]
    assert sorted(asked[:6]) == sorted(asked[6:]) == [str(i) for i in range(6)]
    assert asked[:6] != asked[6:]


def test_the_state_is_all_that_a_source_remembers(tmp_path):
    """A source set to the state of another one goes on as that one does, and rewrites the table from there."""
    whole, later = make_groups(tmp_path, varied=set(range(6))), make_groups(tmp_path, varied=set(range(6)))
    whole.next(step(0), None)
    state = json.loads(json.dumps(whole.get_state()))
    expected = whole.next(step(1), None)
    written = (tmp_path / "table.jsonl").read_text()
    later.set_state(state)
    found = later.next(step(1), None)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.side["advantage"], expected.side["advantage"])
    assert (tmp_path / "table.jsonl").read_text() == written


@pytest.mark.parametrize(("uninformative", "groups"), [("keep", 2), ("drop", 1), ("refill", 2)])
def test_groups_that_teach_nothing(tmp_path, uninformative, groups):
    """Of each two problems that are drawn together, one has samples of equal rewards."""
    order = np.random.default_rng([0, 0]).permutation(6).tolist()
    source = make_groups(tmp_path, varied=set(order[::2]), uninformative=uninformative)
    batch = source.next(step(0), None)
    ids = {row["id"] for row in lines(tmp_path / "table.jsonl")}
    assert len(ids) == groups
    if uninformative != "keep":
        assert ids <= {str(i) for i in order[::2]}
        assert batch.side["advantage"].any(axis=None)
    share = source.metrics()["equal_rewards"]
    assert share.total / share.count == (1 / 3 if uninformative == "refill" else 1 / 2)
    assert source.get_state() == {"drawn": 3 if uninformative == "refill" else 2}


def test_minibatches_share_out_the_samples(tmp_path):
    """Each sample is in one of the parts of a pass; the next pass has the same parts, with values made once."""
    made = []

    def values(params, frozen, batch):
        made.append(batch)
        return {"old_logprobs": batch.targets * 2.0}

    source = make_groups(tmp_path, varied=set(range(6)), minibatches=3, passes=2, values=values)
    batches = [source.next(step(n), None) for n in range(6)]
    assert len(made) == 3 and len(source._engine.seeds) == 8
    samples = [tuple(b.side["sample_logprobs"][b.token_weight != 0]) for b in batches]
    assert samples[:3] == samples[3:]
    assert sum(map(len, samples[:3])) == 2 * (1 + 2 + 3 + 4)
    assert sum(float(b.token_weight.sum()) for b in batches[:3]) == pytest.approx(3)  # a mean over the three is dapo's
    np.testing.assert_array_equal(batches[0].side["old_logprobs"], batches[0].targets * 2.0)
    assert len(lines(tmp_path / "table.jsonl")) == 8


def test_a_rollout_has_a_sample_for_each_minibatch(tmp_path):
    """Where dropping would leave fewer, groups that teach nothing are kept."""
    source = make_groups(tmp_path, varied=set(), uninformative="drop", minibatches=5)
    batches = [source.next(step(n), None) for n in range(5)]
    assert all(b.token_weight.any() and not b.side["advantage"].any() for b in batches)


def test_there_is_no_state_within_a_rollout(tmp_path):
    source = make_groups(tmp_path, varied=set(range(6)), passes=2)
    assert source.get_state() == {"drawn": 0}
    source.next(step(0), None)
    assert source.get_state() is None
    source.next(step(1), None)
    assert source.get_state() == {"drawn": 2}


def test_a_batch_in_which_nothing_teaches_has_advantages_of_zero(tmp_path):
    source = make_groups(tmp_path, varied=set(), uninformative="refill", rounds=3)
    batch = source.next(step(0), None)
    assert not batch.side["advantage"].any() and batch.token_weight.any()
    assert source.get_state() == {"drawn": 6}
