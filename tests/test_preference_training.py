"""Preference training as users run it: the reference stays where training began, resumption, held-out pairs."""

import json
import shutil

import numpy as np
import pytest

from tests.test_train import DEBUG, curve, parameters, run
from tests.workspace import make_workspace

PREFERENCE = str(DEBUG / "preference.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_ends_in_the_same_bits(workspace):
    """Stopped after the first of two steps and started again, also the reference is that of one run."""
    assert run(workspace, "whole", "checkpoint.every=1", config=PREFERENCE) == 0
    shutil.copytree(workspace / "whole", workspace / "resumed")
    shutil.rmtree(workspace / "resumed/checkpoints/step_00000002")
    assert run(workspace, "resumed", "checkpoint.every=1", config=PREFERENCE) == 0
    assert curve(workspace / "resumed") == curve(workspace / "whole")
    for a, b in zip(parameters(workspace / "resumed")[1], parameters(workspace / "whole")[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_policy_leaves_a_reference_that_stays(workspace):
    """Policy and reference agree before the first update, and no longer after it."""
    assert run(workspace, "moving", config=PREFERENCE) == 0
    first, second = [row for row in records(workspace / "moving") if "loss" in row]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["margin"] == pytest.approx(0, abs=1e-6)
    assert first["reward_chosen"] == pytest.approx(0, abs=1e-6)
    assert abs(second["reward_chosen"]) > 1e-3
    held_out = next(row for row in records(workspace / "moving") if "eval/loss" in row)
    assert np.isfinite(held_out["eval/loss"]) and 0 <= held_out["eval/accuracy"] <= 1


def test_a_cached_reference_is_the_frozen_one(workspace):
    """The same curve without the second copy; computed once, read back on resumption, computed anew where damaged."""
    assert run(workspace, "frozen", config=PREFERENCE) == 0
    cached = ("objective.reference=cached", "checkpoint.every=1")
    assert run(workspace, "cached", *cached, config=PREFERENCE) == 0
    found, expected = curve(workspace / "cached"), curve(workspace / "frozen")
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-3)
    (folder,) = (workspace / "cached/reference").iterdir()
    written = (folder / "manifest-0-of-1.json").stat().st_mtime_ns
    shutil.rmtree(workspace / "cached/checkpoints/step_00000002")
    assert run(workspace, "cached", *cached, config=PREFERENCE) == 0
    assert curve(workspace / "cached") == found
    assert (folder / "manifest-0-of-1.json").stat().st_mtime_ns == written
    (folder / "shard-000-00000.logprob.npy").write_bytes(b"damaged")
    shutil.rmtree(workspace / "cached/checkpoints/step_00000002")
    assert run(workspace, "cached", *cached, config=PREFERENCE) == 0
    assert curve(workspace / "cached") == found


def test_dpo_learns_to_prefer_the_pairs_it_sees(workspace):
    pairs = (workspace / "runs/chain_sum/data/pairs.jsonl").read_text().splitlines(keepends=True)
    (workspace / "few.jsonl").write_text("".join(pairs[:8]))
    more = (f"data.sources={workspace / 'few.jsonl'}", "data.validation=null", "train.steps=8", "checkpoint.every=8")
    loss = ("objective.loss=dpo", "objective.beta=0.5", "optimizer.learning_rate=3e-4")
    assert run(workspace, "dpo", *more, *loss, config=PREFERENCE) == 0
    losses = [row["loss"] for row in records(workspace / "dpo") if "loss" in row]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < 0.6


def test_a_beta_is_asked_for_by_cogpo_alone(workspace, capsys):
    pairs = workspace / "runs/chain_sum/data/pairs.jsonl"
    plain = [{k: v for k, v in json.loads(line).items() if k != "beta"} for line in pairs.read_text().splitlines()]
    (workspace / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    source = f"data.sources={workspace / 'plain.jsonl'}"
    assert run(workspace, "no-beta", source, config=PREFERENCE) == 2
    assert "beta: expected a number, got None" in capsys.readouterr().err
    assert run(workspace, "dpo-no-beta", source, "objective.loss=dpo", config=PREFERENCE) == 0
