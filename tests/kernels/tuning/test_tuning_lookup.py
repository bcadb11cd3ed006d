"""A table's choice is taken where it is near and legal; the kernel's rule elsewhere."""

import json
import pathlib

import jax.numpy as jnp
import pytest

from dqjax.kernels.attention.api import make_plan
from dqjax.kernels.tuning import lookup
from dqjax.kernels.tuning.lookup import Problem, chosen, nearest, path_for, read, trial

PROBLEM = Problem("decode_attention", "mosaic_gpu", "bfloat16", 128, 4, 512, 8192)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Writes entries as the table of the device that runs the tests."""

    def write(*entries):
        path = tmp_path / "cpu.json"
        path.write_text(json.dumps({"entries": [p._asdict() | {"choice": choice} for p, choice in entries]}))
        read.cache_clear()
        monkeypatch.setattr(lookup, "path_for", lambda kind: path)

    yield write
    read.cache_clear()


def test_buckets_are_powers_of_two():
    assert [PROBLEM._replace(rows=n).bucket().rows for n in (1, 2, 3, 512, 513)] == [1, 2, 4, 512, 1024]


def test_the_nearest_bucket_within_a_factor_of_two():
    entries = {PROBLEM: 1, PROBLEM._replace(length=2048): 2, PROBLEM._replace(rows=256, length=2048): 3}
    found = {(512, 8192): 1, (512, 16384): 1, (512, 4096): 2, (256, 2048): 3, (512, 1024): 2, (128, 4096): 3}
    for (rows, length), choice in found.items():
        assert nearest(entries, PROBLEM._replace(rows=rows, length=length)) == choice, (rows, length)
    assert nearest(entries, PROBLEM._replace(length=32768)) is None
    assert nearest(entries, PROBLEM._replace(rows=2048)) is None


@pytest.mark.parametrize(
    "other",
    [{"kernel": "attention"}, {"backend": "tpu"}, {"dtype": "float16"}, {"head_size": 64}, {"ratio": 8}],
    ids=lambda other: next(iter(other)),
)
def test_another_problem_has_no_entry(other):
    assert nearest({PROBLEM: 1}, PROBLEM._replace(**other)) is None


def test_the_rule_stands_behind_the_table(table):
    assert chosen(PROBLEM, [256, 512], 512) == 512  # nothing is known
    table((PROBLEM, 256))
    assert chosen(PROBLEM, [256, 512], 512) == 256
    assert chosen(PROBLEM._replace(rows=500, length=8000), [256, 512], 512) == 256
    assert chosen(PROBLEM, [512, 1024], 512) == 512  # what was measured is not legal here


def test_a_kernel_reads_the_table(table):
    ids = jnp.ones((1, 512), jnp.int32)
    before = make_plan(ids, backend="xla")
    assert (before.block_q, before.block_kv) == (128, 128)
    table((Problem("attention", "xla", None, None, None, 512, 512), [64, 256]))
    after = make_plan(ids, backend="xla")
    assert (after.block_q, after.block_kv) == (64, 256)


def test_a_trial_goes_before_the_table_and_notes_what_was_asked(table):
    table((PROBLEM, 256))
    with trial({PROBLEM: 1024}) as on:
        assert chosen(PROBLEM, [256, 1024], 256) == 1024
        assert chosen(PROBLEM._replace(ratio=1), [1, 2], 2) == 2
    assert on.asked == {PROBLEM: ((256, 1024), 256), PROBLEM._replace(ratio=1): ((1, 2), 2)}
    assert chosen(PROBLEM, [256, 1024], 1024) == 256


def test_tables_are_named_after_the_device_and_can_be_read():
    assert path_for("NVIDIA H200").name == "nvidia_h200.json" and path_for("TPU v5 lite").name == "tpu_v5_lite.json"
    folder = pathlib.Path(lookup.__file__).parent
    for path in folder.glob("*.json"):
        entries = json.loads(path.read_text())["entries"]
        assert len(read(path)) == len(entries)
        for entry in entries:
            problem = Problem(*(entry[name] for name in Problem._fields))
            assert problem == problem.bucket() and json.dumps(entry["choice"]) in entry["milliseconds"]
