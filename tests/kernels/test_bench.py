"""The kernel benchmark runs on a CPU, times what it says and tells failures apart."""

import json
import pathlib

import jax.numpy as jnp
import pytest

from dqjax.kernels import bench
from dqjax.kernels.measure import Candidate, jax_candidate, measure


def test_it_runs_and_writes_what_it_measured(tmp_path):
    out = tmp_path / "results" / "cpu.json"
    assert bench.main(["--size", "small", "--rounds", "1", "--repetitions", "1", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["machine"]["platform"] == "cpu" and results["ceilings"]["product_tflops"]
    kinds = [(case["kernel"], case["direction"]) for case in results["cases"]]
    assert len(kinds) == 2 * 2 + 1 + 3
    for case in results["cases"]:
        for name, result in case["results"].items():
            assert "error" not in result, (case, name)
            assert set(result) == {"ms", "spread", "tflops", "memory_bytes"}


@pytest.mark.parametrize("name", ["h200", "h200_vocabulary"])
def test_the_tables_of_the_readme_are_those_of_the_results(name, capsys):
    root = pathlib.Path(__file__).parents[2]
    assert bench.main(["--table", str(root / "kernels" / "results" / f"{name}.json")]) == 0
    assert capsys.readouterr().out in (root / "README.md").read_text()


def test_a_wrong_kernel_is_not_timed_and_fails_the_run(monkeypatch):
    def wrong(*args, **kwargs):
        return 1.1 * attention(*args, **kwargs)

    attention = bench.attention
    monkeypatch.setattr(bench, "attention", wrong)
    rows = []
    monkeypatch.setattr(bench, "_show", rows.append)
    assert bench.main(["--size", "small", "--only", "attention", "--rounds", "1", "--repetitions", "1"]) == 1
    assert all("wrong by" in row["results"]["dqjax_xla"]["error"] for row in rows)


def test_time_is_the_difference_of_n_and_2n(monkeypatch):
    """A constant cost a run, of whatever size, does not count."""
    clock = {"now": 0.0, "calls": []}

    def run(repetitions):
        clock["calls"].append(repetitions)
        clock["now"] += 5 + 0.25 * repetitions

    monkeypatch.setattr("dqjax.kernels.measure.time.perf_counter", lambda: clock["now"])
    timing = measure({"work": Candidate(run, None)}, repetitions=8, rounds=3)
    assert clock["calls"] == [8, 16] * 4
    assert timing["work"] == (250, 0)


def test_memory_is_temporaries_and_output():
    candidate = jax_candidate(lambda a, b: a @ b, (jnp.ones((8, 8)), jnp.ones((8, 8))))
    candidate.run(3)
    assert candidate.memory == 8 * 8 * 4


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0 and "python -m dqjax.bench kernels --out" in capsys.readouterr().out
