"""python -m dqjax.bench train runs on a CPU: all have the same loss, and the figures follow from the seconds."""

import argparse
import json

import numpy as np
import pytest

from dqjax.bench import __main__ as bench
from dqjax.bench import train
from dqjax.bench.peers import TransformersStep
from dqjax.bench.rows import packed_rows
from dqjax.commands import run_command
from dqjax.config import ConfigError

SHAPE = ["--model", "miniature", "--layers", "1", "--rows", "2", "--tokens", "128", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # set by the command; put back after the test


def test_packed_rows_match_transformers_in_loss_norm_and_update(tmp_path, capsys):
    pytest.importorskip("torch")
    out = tmp_path / "results" / "cpu.json"
    asked = ["--mean-document", "40", "--micro-batches", "2", "--repetitions", "1", "--rounds", "1", "--out", str(out)]
    assert bench.main(["train", *SHAPE, *asked]) == 0
    results = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == results
    candidates = results["candidates"]
    assert list(candidates) == ["dqjax_full", "transformers_sdpa_checkpointing", "transformers_sdpa"]
    exact = results["check"]["exact"]
    for found in candidates.values():
        assert found["losses"][0] == pytest.approx(exact["loss"], rel=1e-4)
        assert found["losses"] == pytest.approx(candidates["dqjax_full"]["losses"], rel=1e-4)  # after an update too
        assert found["losses"][1] < found["losses"][0]
        assert found["gradient_norms"] == pytest.approx(candidates["dqjax_full"]["gradient_norms"], rel=1e-3)
        assert found["tokens_per_second"] * found["seconds"] == pytest.approx(256)
        assert found["share_of_product"] * results["product_flops"] == pytest.approx(found["model_flops_per_second"])
        assert found["model_flops_per_second"] * found["seconds"] == pytest.approx(results["work"]["flops"])
    assert candidates["transformers_sdpa"]["holds"] == "float32 weights, gradients and moments"
    # One layer: q, k, v, o and three MLP matrices, and the output table of 512 × 128.
    matrices = 128 * 32 * (4 + 2 + 2 + 4) + 3 * 128 * 384 + 512 * 128
    batch = packed_rows(512, 2, 128, 40)
    pairs = sum(n * (n + 1) / 2 for row in batch.segment_ids for n in np.bincount(row)[1:])
    assert results["work"]["flops"] == 6 * matrices * 256 + 3.5 * 4 * (4 * 32) * pairs


def test_bfloat16_is_held_against_float32_and_a_peer_that_fails_is_a_result(monkeypatch, capsys):
    monkeypatch.setattr(train, "_peers", lambda *_: [TransformersStep("no_such_attention")])
    asked = ["--mean-document", "0", "--check-only", "--remat", "none"]
    assert bench.main(["train", *SHAPE[:-1], "bfloat16", *asked]) == 0
    results = json.loads(capsys.readouterr().out)
    check, found = results["check"], results["candidates"]
    assert "seconds" not in found["dqjax_none"]
    assert 0 < abs(check["dqjax"]["loss"] - check["exact"]["loss"]) < 2e-3 * check["exact"]["loss"]
    worst = check["worst_parameter"]
    assert 0 < worst["dqjax"] < 2 * worst["reference"] + 2**-5
    error = found["transformers_no_such_attention"]["error"]
    assert "no_such_attention" in error or "torch" in error  # or torch is not installed


def test_what_is_off_is_refused():
    exact = {"loss": 6.0, "gradient_norm": 2.0}
    with pytest.raises(FloatingPointError, match="loss 6.01, float32: 6; off by 0.0017, allowed 0.0001"):
        train._agree({"losses": [6.01], "gradient_norms": [2.0]}, exact, "float32")
    with pytest.raises(FloatingPointError, match="gradient_norm 2.1"):
        train._agree({"losses": [6.0], "gradient_norms": [2.1]}, exact, "bfloat16")
    with pytest.raises(FloatingPointError, match="loss nan"):
        train._agree({"losses": [float("nan")], "gradient_norms": [2.0]}, exact, "bfloat16")
    same = {"loss": 6.0, "gradient_norm": 2.0}
    worst = {"name": "layers.mlp.up.kernel[3]", "dqjax": 0.2, "reference": 0.01}
    check = {"exact": exact, "reference": same, "dqjax": same, "worst_parameter": worst, "backend": "xla"}
    with pytest.raises(FloatingPointError, match=r"kernel\[3\] is off by 0.2 with attention 'xla', allowed 0.05"):
        train._refuse(check, "bfloat16")


def test_every_way_of_transformers_has_its_name():
    options = argparse.Namespace(mean_document=64, compile=True, dtype="bfloat16")
    assert [how.name for how in train._peers(options, "cpu")] == [
        "transformers_sdpa_checkpointing",
        "transformers_sdpa",
        "transformers_sdpa_checkpointing_compiled",
        "transformers_sdpa_compiled",
        "transformers_sdpa_checkpointing_autocast",
    ]
    assert "transformers_flex_attention" in [how.name for how in train._peers(options, "gpu")]
    assert train._peers(options, "tpu") == []


def test_peers_are_chosen_by_name():
    peers = [TransformersStep(), TransformersStep(checkpointing=True)]
    assert train._chosen(peers, None) == peers
    assert train._chosen(peers, ["transformers_sdpa_checkpointing"]) == peers[1:]
    assert train._chosen(peers, []) == []
    with pytest.raises(ConfigError, match="transformers_sdpa, .* got transformers_eager"):
        train._chosen(peers, ["transformers_eager"])


def test_rows_are_full_and_targets_stay_in_their_document():
    batch = packed_rows(100, 3, 500, 60)
    assert (batch.segment_ids > 0).all() and batch.segment_ids.max() > 3
    assert batch.token_weight.sum() == pytest.approx(1)
    for b, t in zip(*np.nonzero(batch.token_weight)):
        assert batch.targets[b, t] == batch.tokens[b, t + 1]
        assert batch.segment_ids[b, t] == batch.segment_ids[b, t + 1]
        assert batch.positions[b, t + 1] == batch.positions[b, t] + 1
    first = batch.positions == 0
    assert (batch.token_weight > 0).sum() == batch.tokens.size - first.sum()


def test_bad_arguments(capsys):
    assert run_command(lambda: bench.main(["train", *SHAPE, "--micro-batches", "3"])) == 2
    assert "--rows 2 do not divide into --micro-batches 3" in capsys.readouterr().err
    assert run_command(lambda: bench.main(["train", "--tokens", "1"])) == 2
    assert "expected at least 1" in capsys.readouterr().err
