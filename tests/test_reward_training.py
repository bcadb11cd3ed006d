"""Reward training as users run it: pairs in, a scalar head out, held-out accuracy, resumption."""

import json
import shutil

import numpy as np
import pytest

from dqjax import score
from dqjax.commands import run_command
from dqjax.convert.__main__ import main as convert
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
    pytest.importorskip("matplotlib")
    assert (workspace / "metrics/reliability.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_pairs_are_told_apart(workspace):
    """Answers of chain_sum against ones that are off by thousands, which needs no arithmetic: 9 in 10 unseen pairs."""
    with (workspace / "far_off.jsonl").open("w") as file:
        for i, line in enumerate((workspace / "runs/chain_sum/data/pairs.jsonl").read_text().splitlines()):
            pair = json.loads(line)
            right = pair["chosen"][0]["content"]
            wrong = str(int(right) + (-1) ** i * 1000 * (1 + i % 9))
            row = {"prompt": pair["prompt"], "chosen": right, "rejected": wrong}
            file.write(json.dumps(row) + "\n")
    data = (f"data.sources={workspace / 'far_off.jsonl'}", "data.validation=0.2", "data.row_length=256")
    more = ("train.steps=30", "train.eval_every=30", "checkpoint.every=30", "log.every=30")
    assert run(workspace, "far_off", *data, *more, config=REWARD) == 0
    rows = [json.loads(line) for line in (workspace / "far_off/metrics.jsonl").read_text().splitlines()]
    held_out = next(row for row in rows if "eval/loss" in row)
    assert held_out["eval/accuracy"] >= 0.9 and held_out["eval/margin"] > 1


def test_a_margin_that_is_asked_for_must_be_there(workspace, capsys):
    assert run(workspace, "margin", "objective.margin=true", config=REWARD) == 2
    assert "margin: expected a number, got None" in capsys.readouterr().err


def scores_of(workspace, checkpoint, name):
    pairs, out = workspace / "few.jsonl", workspace / f"{name}.jsonl"
    lines = (workspace / "runs/chain_sum/data/pairs.jsonl").read_text().splitlines(keepends=True)
    pairs.write_text("".join(lines[:6]))
    command = ["--checkpoint", str(checkpoint), "--input", str(pairs), "--output", str(out)]
    assert run_command(lambda: score.main([*command, "--row-length", "512", "--dtype", "float32"])) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_export_scores_as_the_run_does_in_transformers_and_here(workspace):
    """The same numbers from the run, from transformers on a right-padded batch, and from the export read back."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    assert run(workspace, "served", config=REWARD) == 0
    ours = scores_of(workspace, workspace / "served", "run")
    out = workspace / "export"
    assert convert(["to-hf", str(workspace / "served"), str(out), "--dtype", "float32"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"] and config["id2label"] == {"0": "reward"}
    assert config["problem_type"] == "regression"  # a server leaves the logit as it is
    card = (out / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "vllm serve . --runner pooling --dtype float32" in card
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    pairs = [json.loads(line) for line in (workspace / "few.jsonl").read_text().splitlines()]
    chats = [[*pair["prompt"], *pair[side]] for pair in pairs for side in ("chosen", "rejected")]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    inputs = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")
    assert (inputs["attention_mask"] == 0).any()
    with torch.no_grad():
        theirs = model(**inputs).logits[:, 0].numpy()
    expected = [row[f"score_{side}"] for row in ours for side in ("chosen", "rejected")]
    np.testing.assert_allclose(theirs, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 1e-3
    assert scores_of(workspace, out, "export") == ours
    assert convert(["from-hf", str(out), str(workspace / "converted")]) == 0
    assert scores_of(workspace, workspace / "converted", "converted") == ours


def test_training_goes_on_from_an_exported_classifier(workspace, capsys):
    """The head is kept: with a rate of next to nothing the export scores as before. A language model's objective refuses it."""
    assert run(workspace, "first", config=REWARD) == 0
    out = workspace / "first_export"
    assert convert(["to-hf", str(workspace / "first"), str(out), "--dtype", "float32"]) == 0
    before = scores_of(workspace, out, "before")
    still = ("optimizer.learning_rate=1e-30", "train.steps=1")
    for source in (out, workspace / "first"):
        shutil.rmtree(workspace / "second", ignore_errors=True)
        assert run(workspace, "second", f"model.init_from={source}", *still, config=REWARD) == 0
        assert scores_of(workspace, workspace / "second", "after") == before
    assert run(workspace, "refused", f"model.init_from={out}", config=str(DEBUG / "sft.yaml")) == 2
    assert "holds a classifier (1 labels); expected a language model" in capsys.readouterr().err


def test_a_language_model_is_not_scored_with(workspace, capsys):
    command = ["--checkpoint", str(workspace / "runs/chain_sum/student"), "--input", "x.jsonl", "--output", "y.jsonl"]
    assert run_command(lambda: score.main(command)) == 2
    assert "holds a language model; expected a reward model or a scorer" in capsys.readouterr().err
