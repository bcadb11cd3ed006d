"""python -m dqjax.bench rollout runs on a CPU, and its figures follow from what it measured."""

import json

import pytest

from dqjax.bench import __main__ as bench
from dqjax.bench import rollout
from dqjax.commands import run_command
from dqjax.models.config import SIZES

SHAPE = [
    "--model",
    "miniature",
    "--dtype",
    "float32",
    "--batch",
    "4",
    "--prompt-tokens",
    "20",
    "--new-tokens",
    "8",
    "--rounds",
    "1",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # set by the command; put back after the test


def test_it_measures_both_and_writes_the_figures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(rollout, "_read_rate", lambda: 1e9)
    out = tmp_path / "results" / "cpu.json"
    assert bench.main(["rollout", *SHAPE, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == results
    ours, theirs, config = results["dqjax"], results["transformers"], SIZES["miniature"]
    assert ours["tokens_per_second"] * ours["seconds"] == pytest.approx(32)
    assert results["ratio"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    # The first step reads 20 keys, the last 27: 23.5 on average, of 3 layers of 2 heads of 32 entries, 4 bytes each.
    assert ours["mean_cache_bytes"] == 4 * 23.5 * 2 * 3 * 2 * 32 * 4
    moved = config.matmul_parameters * 4 + ours["mean_cache_bytes"]
    assert ours["roofline_share"] == pytest.approx(moved / 1e9 / (ours["step_ms"] / 1e3))
    assert ours["step_ms"] * 8 == pytest.approx(ours["decode_seconds"] * 1e3)


def test_a_peer_that_fails_is_a_result(monkeypatch, capsys):
    def missing(*_, **__):
        raise ImportError("no torch here")

    monkeypatch.setattr(rollout, "transformers_generate", missing)
    monkeypatch.setattr(rollout, "_read_rate", lambda: 1e9)
    assert bench.main(["rollout", *SHAPE]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["transformers"] == {"error": "ImportError: no torch here"} and "ratio" not in results


def test_bad_arguments(capsys):
    assert bench.main(["rolout"]) == 2
    assert "usage: python -m dqjax.bench" in capsys.readouterr().err
    assert run_command(lambda: bench.main(["rollout", "--batch", "0"])) == 2
    assert "expected at least 1" in capsys.readouterr().err
