"""Scorer training as users run it: judge labels in, twenty logits out, agreement with the judge, resumption."""

import json
import shutil

import numpy as np
import pytest

from dqjax import score
from dqjax.commands import run_command
from dqjax.convert.__main__ import main as convert
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
        table = np.array([line.split() for line in held_out[f"eval/confusion_{name}"].splitlines()[1:]], int)
        counts, apart = table[:, 1:], (np.arange(10)[:, None] - np.arange(10)) ** 2
        by_chance = np.outer(counts.sum(1), counts.sum(0)) / counts.sum()
        kappa = 1 - (apart * counts).sum() / (apart * by_chance).sum()
        assert held_out[f"eval/kappa_{name}"] == pytest.approx(kappa, abs=1e-5)


def test_a_file_is_scored_with_levels(workspace):
    labels = workspace / "runs/chain_sum/data/labels.jsonl"
    (workspace / "few.jsonl").write_text("".join(labels.read_text().splitlines(keepends=True)[:5]))
    command = ["--checkpoint", str(workspace / "whole"), "--input", str(workspace / "few.jsonl")]
    command += ["--output", str(workspace / "scores.jsonl"), "--row-length", "256", "--dtype", "float32"]
    assert run_command(lambda: score.main(command)) == 0
    rows = [json.loads(line) for line in (workspace / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert all(0 <= row[name] <= 9 for row in rows for name in ("verbosity", "difficulty"))


def test_the_export_gives_the_levels_in_transformers(workspace):
    """Softmax and mean in numpy over transformers' twenty logits are the levels that the run is scored with."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    out = workspace / "export"
    assert convert(["to-hf", str(workspace / "whole"), str(out), "--dtype", "float32"]) == 0
    assert "Ten logits a label" in (out / "README.md").read_text()
    labels, found = workspace / "runs/chain_sum/data/labels.jsonl", {}
    (workspace / "five.jsonl").write_text("".join(labels.read_text().splitlines(keepends=True)[:5]))
    for name, checkpoint in (("run", workspace / "whole"), ("export", out)):
        command = ["--checkpoint", str(checkpoint), "--input", str(workspace / "five.jsonl"), "--dtype", "float32"]
        assert run_command(lambda: score.main([*command, "--output", str(workspace / f"{name}.jsonl")])) == 0
        found[name] = [json.loads(line) for line in (workspace / f"{name}.jsonl").read_text().splitlines()]
    assert found["run"] == found["export"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    for line, row in zip((workspace / "five.jsonl").read_text().splitlines(), found["run"], strict=True):
        inputs = tokenizer.apply_chat_template(json.loads(line)["messages"], return_tensors="pt", return_dict=True)
        with torch.no_grad():
            p = np.exp(model(**inputs).logits.numpy().reshape(2, 10))
        levels = (p / p.sum(-1, keepdims=True)) @ np.arange(10)
        np.testing.assert_allclose([row["verbosity"], row["difficulty"]], levels, rtol=1e-5)
