"""Scorer training as users run it: judge labels in, twenty logits out, agreement with the judge, resumption."""

import json
import shutil

import numpy as np
import pytest

from dqjax import score
from dqjax.commands import run_command
from tests.test_train import DEBUG, curve, parameters, run
from tests.workspace import make_workspace

SCORER = str(DEBUG / "scorer.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"))
    assert run(workspace, "whole", "checkpoint.every=1", config=SCORER) == 0
    return workspace


def test_a_resumed_run_ends_in_the_same_bits(workspace):
    """Stopped after the first of two steps and started again, the curve and the state are those of one run."""
    shutil.copytree(workspace / "whole", workspace / "resumed")
    shutil.rmtree(workspace / "resumed/checkpoints/step_00000002")
    assert run(workspace, "resumed", "checkpoint.every=1", config=SCORER) == 0
    assert curve(workspace / "resumed") == curve(workspace / "whole")
    for a, b in zip(parameters(workspace / "resumed")[1], parameters(workspace / "whole")[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_training_starts_at_chance_and_reports_error_and_agreement(workspace):
    rows = [json.loads(line) for line in (workspace / "whole/metrics.jsonl").read_text().splitlines()]
    first, held_out = rows[0], next(row for row in rows if "eval/loss" in row)
    assert first["loss"] == pytest.approx(np.log(10), abs=0.05)  # the mean over both labels
    for name in ("verbosity", "difficulty"):
        assert {f"loss_{name}", f"absolute_error_{name}"} <= first.keys()
        assert {f"eval/absolute_error_{name}", f"eval/kappa_{name}"} <= held_out.keys()


def test_a_file_is_scored_with_levels(workspace):
    labels = workspace / "runs/chain_sum/data/labels.jsonl"
    (workspace / "few.jsonl").write_text("".join(labels.read_text().splitlines(keepends=True)[:5]))
    command = ["--checkpoint", str(workspace / "whole"), "--input", str(workspace / "few.jsonl")]
    command += ["--output", str(workspace / "scores.jsonl"), "--row-length", "256", "--dtype", "float32"]
    assert run_command(lambda: score.main(command)) == 0
    rows = [json.loads(line) for line in (workspace / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(0 <= row[name] <= 9 for row in rows for name in ("verbosity", "difficulty"))
