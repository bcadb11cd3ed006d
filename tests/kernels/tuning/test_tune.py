"""`--tune` writes a table that the kernels then follow, and takes no choice that is wrong or only seems faster."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from dqjax.kernels import bench, workloads
from dqjax.kernels.measure import Candidate, Timing
from dqjax.kernels.tuning import tune as tuning
from dqjax.kernels.tuning.lookup import Problem, chosen, read

PROBLEM = Problem("decode_attention", "xla", "float32", 8, 1, 2, 16)


def work(wrong=()):
    """Multiplies by one, whatever is chosen, but for the choices that are wrong."""

    def make():
        choice = chosen(PROBLEM, [1, 2, 4], 2)
        out = jnp.full(4, 2.0 if choice in wrong else 1.0)
        return Candidate(lambda repetitions: choice, 0, lambda: {"out": out})

    return workloads.Work("forward", 1.0, {"out": np.ones(4)}, lambda results: results, {"dqjax_xla": make})


def tuned(monkeypatch, path, milliseconds, wrong=()):
    def measure(candidates, repetitions, rounds):
        return {choice: Timing(milliseconds[int(choice)], 0.1) for choice in candidates}

    monkeypatch.setattr(tuning, "measure", measure)
    tuning.tune([work(wrong)], path, 1, 1)
    (entry,) = json.loads(path.read_text())["entries"]
    return entry


def test_the_fastest_choice_is_taken(monkeypatch, tmp_path):
    entry = tuned(monkeypatch, tmp_path / "t.json", {1: 3.0, 2: 2.0, 4: 1.0})
    assert entry == PROBLEM._asdict() | {"choice": 4, "milliseconds": {"1": 3.0, "2": 2.0, "4": 1.0}}
    assert read(tmp_path / "t.json") == {PROBLEM: 4}


def test_a_tie_keeps_the_rule(monkeypatch, tmp_path):
    assert tuned(monkeypatch, tmp_path / "t.json", {1: 3.0, 2: 1.05, 4: 1.0})["choice"] == 2


def test_a_wrong_choice_is_not_taken(monkeypatch, tmp_path):
    entry = tuned(monkeypatch, tmp_path / "t.json", {1: 3.0, 2: 2.0, 4: 1.0}, wrong=(4,))
    assert entry["choice"] == 2 and "4" not in entry["milliseconds"]


def test_the_command_writes_a_table_and_leaves_other_entries(tmp_path):
    path = tmp_path / "cpu.json"
    other = PROBLEM._asdict() | {"choice": 4, "milliseconds": {"4": 1.0}}
    path.write_text(json.dumps({"entries": [other]}))
    arguments = ["--size", "small", "--tune", "--rounds", "1", "--repetitions", "1", "--out", str(path)]
    assert bench.main([*arguments, "--only", "attention", "--cases", "1"]) == 0
    table = json.loads(path.read_text())
    assert table["machine"]["device"] == jax.devices()[0].device_kind
    attention, kept = table["entries"]
    assert kept == other
    assert (attention["kernel"], attention["backend"], attention["length"]) == ("attention", "xla", 256)
    assert len(attention["milliseconds"]) == 9
    assert read(path)[Problem("attention", "xla", None, None, None, 256, 256)] == tuple(attention["choice"])


def test_what_has_no_choice_leaves_no_table(tmp_path):
    assert bench.main(["--size", "small", "--tune", "--only", "decode", "--out", str(tmp_path / "t.json")]) == 0
    assert not (tmp_path / "t.json").exists()
