"""Training on a policy's own samples: what a run leaves behind, its resumption, and its bounds."""

import json

import numpy as np
import pytest

from dqjax import train
from dqjax.commands import run_command
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
        assert row["seconds/generate"] > 0 and row["seconds/reward"] > 0
        assert row["gradient_norm"] > 0
    (evaluated,) = [row for row in lines(whole / "metrics.jsonl") if "eval/accuracy" in row and row["step"] == 2]
    assert 0 <= evaluated["eval/accuracy"] <= 1


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
    more = ("train.steps=3", "objective.table=2")
    stopped = workspace / "stopped"
    assert run(workspace, "stopped", *more, "checkpoint.every=1") == 0
    for later in sorted((stopped / "checkpoints").glob("step_*"))[1:]:
        later.rename(workspace / f"removed-{later.name}")
    assert run(workspace, "stopped", *more, "checkpoint.every=1") == 0
    assert curve(stopped) == curve(whole)
    assert (stopped / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    for a, b in zip(parameters(stopped)[1], parameters(whole)[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
