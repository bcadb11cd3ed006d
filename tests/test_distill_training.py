"""White-box distillation as users run it: a teacher on the mesh, its cache, several at once, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from dqjax import teacher_logits
from dqjax.commands import run_command
from dqjax.convert.new import new_student
from dqjax.data.__main__ import main as data_command
from tests.test_train import DEBUG, curve, parameters, run
from tests.workspace import make_workspace, overrides

DISTILL = str(DEBUG / "distill.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    new_student("miniature", folder / "runs/chain_sum/tokenizer", folder / "teacher", seed=1)
    return folder


def cache(workspace, name, *more, teacher="teacher"):
    pointed = overrides(workspace, "unused", *more, config="distill")
    command = ["--config", DISTILL, "--teacher", str(workspace / teacher), "--output", str(workspace / name)]
    return run_command(lambda: teacher_logits.main([*command, *pointed]))


def teachers(*values):
    return "objective.teachers=" + json.dumps(list(values))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def online(workspace):
    assert run(workspace, "online", teachers(str(workspace / "teacher")), "checkpoint.every=1", config=DISTILL) == 0
    return workspace / "online"


def test_a_cache_of_all_tokens_is_the_teacher_on_the_mesh(workspace, online):
    assert cache(workspace, "all", "--k=320", "--dtype=float32") == 0
    assert run(workspace, "cached", teachers({"cache": str(workspace / "all")}), config=DISTILL) == 0
    expected, found = curve(online), curve(workspace / "cached")
    # The bucket of other tokens is empty here, but one float32 rounding for the teacher: 1e-7 · log(1e-7 / 0+) is 2e-5.
    assert found[1][0] == pytest.approx(expected[1][0], abs=5e-5)
    assert found[1][1] == pytest.approx(expected[1][1], rel=1e-4)
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-2)  # Adam's first step turns rounding into signs
    last = next(row for row in metrics(online) if "eval/loss" in row)
    assert {"eval/cross_entropy", "eval/sample"} <= last.keys()


def test_a_resumed_run_ends_in_the_same_bits(workspace):
    """With a teacher on the mesh and a compact cache at once, stopped after the first of two steps."""
    assert cache(workspace, "few", "--k=8") == 0
    both = teachers(
        {"model": str(workspace / "teacher"), "weight": 0.25}, {"cache": str(workspace / "few"), "weight": 0.75}
    )
    assert run(workspace, "whole", both, "checkpoint.every=1", config=DISTILL) == 0
    shutil.copytree(workspace / "whole", workspace / "resumed")
    shutil.rmtree(workspace / "resumed/checkpoints/step_00000002")
    assert run(workspace, "resumed", both, "checkpoint.every=1", config=DISTILL) == 0
    assert curve(workspace / "resumed") == curve(workspace / "whole")
    for a, b in zip(parameters(workspace / "resumed")[1], parameters(workspace / "whole")[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    row = metrics(workspace / "whole")[0]
    mixed = 0.25 * row["divergence_0"] + 0.75 * row["divergence_1"]
    assert row["loss"] == pytest.approx(mixed, rel=1e-5) and row["divergence_1"] < row["divergence_0"]


def test_what_the_cache_was_not_written_for_is_refused(workspace, capsys):
    assert cache(workspace, "cold", "--k=4") == 0
    cold = teachers({"cache": str(workspace / "cold")})
    assert run(workspace, "hot", cold, "objective.temperature=2", config=DISTILL) == 2
    assert "temperature 1.0, here 2.0" in capsys.readouterr().err
    assert cache(workspace, "cold", "--k=4") == 2
    assert "holds a cache already" in capsys.readouterr().err
    assert cache(workspace, "wide", "--k=1000") == 2
    assert "--k: expected 1 to 320" in capsys.readouterr().err
    assert run(workspace, "other", cold, "data.train_on_prompt=true", config=DISTILL) == 2
    assert "sequences as they are tokenised now" in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_is_refused(workspace, capsys):
    other, data = workspace / "other_tokenizer", workspace / "runs/chain_sum/data/test.jsonl"
    assert data_command(["tokenizer", "--input", str(data), "--vocab-size", "300", "--out", str(other)]) == 0
    new_student("miniature", other, workspace / "foreign")
    capsys.readouterr()
    assert run(workspace, "foreign_run", teachers(str(workspace / "foreign")), config=DISTILL) == 2
    assert "has another tokenizer: token" in capsys.readouterr().err
    assert cache(workspace, "foreign_cache", teacher="foreign") == 2
    assert "has another tokenizer: token" in capsys.readouterr().err


def test_the_student_is_taught_on_its_own_answers(workspace, capsys):
    """All batches sampled; stopped after the first of two steps and started again, the run ends in the same bits."""
    own = ("objective.on_policy={fraction: 1.0, max_new_tokens: 12}", f"objective.teachers=[{workspace / 'teacher'}]")
    more = (*own, "checkpoint.every=1", "train.sample_tokens=0")
    assert run(workspace, "own", *more, config=DISTILL) == 0
    first = metrics(workspace / "own")[0]
    assert first["on_policy"] == 1 and 0 < first["sampled_tokens"] <= 12
    shutil.copytree(workspace / "own", workspace / "own_again")
    shutil.rmtree(workspace / "own_again/checkpoints/step_00000002")
    assert run(workspace, "own_again", *more, config=DISTILL) == 0
    assert curve(workspace / "own_again") == curve(workspace / "own")
    assert run(workspace, "cut", *own, "data.too_long=split", config=DISTILL) == 2
    assert "answers are sampled whole" in capsys.readouterr().err
