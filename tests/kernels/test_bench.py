"""The kernel benchmark runs on a CPU, times what it says and tells failures apart."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.kernels import bench, workloads
from dqjax.kernels.measure import Candidate, jax_candidate, measure


SMALL = ["--size", "small", "--rounds", "1", "--repetitions", "1"]


def test_it_runs_and_writes_what_it_measured(tmp_path):
    out = tmp_path / "results" / "cpu.json"
    assert bench.main([*SMALL, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    kinds = [(row["kernel"], row["direction"]) for row in rows]
    assert len(kinds) == 2 * 2 + 1 + 3
    for row in rows:
        assert row["run"]["machine"]["platform"] == "cpu" and row["run"]["ceilings"]["product_tflops"]
        for name, result in row["results"].items():
            assert set(result) == {"relative_error", "ms", "spread", "tflops", "memory_bytes"}, (row, name)
            assert result["relative_error"] < bench.TOLERANCE


def test_a_shape_measured_again_replaces_its_rows_alone(tmp_path):
    out = tmp_path / "cpu.json"
    for only in ("attention", "decode"):
        assert bench.main([*SMALL, "--only", only, "--out", str(out)]) == 0
    before = json.loads(out.read_text())
    assert bench.main([*SMALL, "--only", "attention", "--cases", "1", "--out", str(out)]) == 0
    after = json.loads(out.read_text())
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, False, True]


def test_a_shape_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([*SMALL, "--only", "decode", "--cases", "7"])
    assert stop.value.code == 2 and "no shape of these numbers [7]" in capsys.readouterr().err


def test_the_tables_of_the_readme_are_those_of_the_results(capsys):
    root = pathlib.Path(__file__).parents[2]
    assert bench.main(["--table", str(root / "kernels" / "results" / "h200.json")]) == 0
    readme = (root / "README.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in readme


def test_what_ties_within_the_spread_is_bold_and_a_ceiling_never_is():
    results = {
        "dqjax_xla": {"ms": 1.0, "spread": 0.01},
        "cudnn_jax": {"ms": 1.2, "spread": 0.01},
        "cudnn_torch": {"ms": 1.04, "spread": 0.05},
        "fa3_jax": {"ms": 1.1, "spread": 0.02},
        "read_the_cache": {"ms": 0.5, "spread": 0.0},
        "flex_attention": {"error": "absent"},
    }
    row = {"kernel": "decode", "direction": "forward", "B": 1, "S": 2, "N": 4, "K": 2, "H": 64, "results": results}
    line = bench.markdown([row])[0].splitlines()[-1]
    assert line == "| 1 × 2 | 4/2 of 64 | forward | **1.00** | **1.04** | 1.10 | 0.50 |"


def test_a_wrong_kernel_is_not_timed_and_fails_the_run(monkeypatch):
    def wrong(*args, **kwargs):
        return 1.1 * attention(*args, **kwargs)

    attention = workloads.attention
    monkeypatch.setattr(workloads, "attention", wrong)
    rows = []
    monkeypatch.setattr(bench, "_show", rows.append)
    assert bench.main([*SMALL, "--only", "attention"]) == 1
    assert all("wrong by" in row["results"]["dqjax_xla"]["error"] for row in rows)


def test_a_wrong_gradient_is_not_timed(monkeypatch):
    """The values are right, their derivative is too large by a tenth."""

    def wrong(*args, **kwargs):
        out = attention(*args, **kwargs)
        return 1.1 * out - jax.lax.stop_gradient(0.1 * out)

    attention = workloads.attention
    monkeypatch.setattr(workloads, "attention", wrong)
    rows = []
    monkeypatch.setattr(bench, "_show", rows.append)
    assert bench.main([*SMALL, "--only", "attention", "--cases", "1"]) == 1
    forward, both = (row["results"]["dqjax_xla"] for row in rows)
    assert "ms" in forward and "wrong by" in both["error"]


def test_what_approximates_is_timed_with_its_error():
    def candidate():
        return jax_candidate(lambda x: {"out": 1.2 * x}, (jnp.ones(8),))

    want, part = {"out": np.ones(8)}, lambda results: results
    candidates = {"one": candidate, "other": candidate}
    work = workloads.Work("forward", 1.0, want, part, candidates, approximate=("one",))
    results = bench._run(work, argparse.Namespace(repetitions=1, rounds=1))
    assert "ms" in results["one"] and results["one"]["relative_error"] == pytest.approx(0.2)
    assert "wrong by 0.2" in results["other"]["error"]


def test_time_is_the_difference_of_n_and_2n(monkeypatch):
    """A constant cost a run, of whatever size, does not count."""
    clock = {"now": 0.0, "calls": []}

    def run(repetitions):
        clock["calls"].append(repetitions)
        clock["now"] += 5 + 0.25 * repetitions

    monkeypatch.setattr("dqjax.kernels.measure.time.perf_counter", lambda: clock["now"])
    timing = measure({"work": Candidate(run, None, None)}, repetitions=8, rounds=3)
    assert clock["calls"] == [8, 16] * 4
    assert timing["work"] == (250, 0)


def test_a_candidate_gives_its_results_and_the_memory_of_temporaries_and_output():
    a, b = jax.random.normal(jax.random.key(0), (2, 128, 128))
    candidate = jax_candidate(lambda a, b: {"product": a @ b}, (a, b))
    candidate.run(3)
    np.testing.assert_allclose(candidate.results()["product"], a @ b, rtol=1e-5, atol=1e-5)
    assert a.nbytes <= candidate.memory < a.nbytes + 1024  # the loop's own numbers


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0 and "python -m dqjax.bench kernels --out" in capsys.readouterr().out
