"""Reward training as users run it: pairs in, a scalar head out, held-out accuracy, resumption."""

import json
import shutil

import numpy as np
import pytest

from tests.test_train import DEBUG, curve, parameters, run
from tests.workspace import make_workspace

REWARD = str(DEBUG / "reward.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def test_a_resumed_run_ends_in_the_same_bits(workspace):
    """Stopped after the first of two steps and started again, the curve and the state are those of one run."""
    assert run(workspace, "whole", "checkpoint.every=1", config=REWARD) == 0
    shutil.copytree(workspace / "whole", workspace / "resumed")
    shutil.rmtree(workspace / "resumed/checkpoints/step_00000002")
    assert run(workspace, "resumed", "checkpoint.every=1", config=REWARD) == 0
    assert curve(workspace / "resumed") == curve(workspace / "whole")
    for a, b in zip(parameters(workspace / "resumed")[1], parameters(workspace / "whole")[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_micro_batches_do_not_change_the_curve(workspace):
    """The weights of pairs are those of the global batch, so a split of it adds up to the same loss and gradient."""
    assert run(workspace, "one", "train.batch_rows=16", config=REWARD) == 0
    assert run(workspace, "two", "train.batch_rows=16", "train.accumulate=2", config=REWARD) == 0
    np.testing.assert_allclose(list(curve(workspace / "two").values()), list(curve(workspace / "one").values()), rtol=2e-5)


def test_training_starts_at_even_odds_and_reports_accuracy_margin_and_calibration(workspace):
    assert run(workspace, "metrics", config=REWARD) == 0
    rows = [json.loads(line) for line in (workspace / "metrics/metrics.jsonl").read_text().splitlines()]
    first, held_out = rows[0], next(row for row in rows if "eval/loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=0.02)  # a head near zero gives every pair p = 1/2
    assert {"accuracy", "margin", "score"} <= first.keys()
    for name in ("loss", "accuracy", "margin", "calibration_error"):
        assert np.isfinite(held_out[f"eval/{name}"]), name
    assert any(name.startswith("eval/accuracy_by_length/") for name in held_out)
    assert any(name.startswith("eval/calibration_accuracy/") for name in held_out)


def test_a_margin_that_is_asked_for_must_be_there(workspace, capsys):
    assert run(workspace, "margin", "objective.margin=true", config=REWARD) == 2
    assert "margin: expected a number, got None" in capsys.readouterr().err
