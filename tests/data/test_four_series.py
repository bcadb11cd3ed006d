"""configs/data/four_series.yaml as a user runs it: problems of reasoning-gym, endpoints on loopback, files that train."""

import json
import pathlib

import pytest

from dqjax import score
from dqjax.data.__main__ import main
from dqjax.data.chain_rows import DIFFICULTY, VERBOSITY
from tests.data.chat_server import ChatServer
from tests.data.factory import counts, read_jsonl
from tests.data.test_pipeline import solver
from tests.test_train import DEBUG, run
from tests.workspace import make_workspace

FOUR_SERIES = pathlib.Path(__file__).parents[2] / "configs/data/four_series.yaml"
TRIAL = {"task": "chain_sum", "seed": 7000, "size": 30}
TRIAL["params"] = {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 2}


def classroom(question, before, sent):
    """The solver of the pipeline's tests; every other chain of qwq's is wrong."""
    seed = 3 * sent["seed"] if sent["model"] == "qwq" else sent["seed"]
    return solver(question, before, sent | {"seed": seed})


def run_four_series(workspace, url, *more):
    teachers = [{"name": name, "endpoints": [{"url": url, "model": name}]} for name in ("r1", "qwq", "judge")]
    settings = {"teachers": teachers, "collect.sources": [TRIAL]}
    settings["collect.decontaminate"] = {"benchmarks": [f"{workspace}/runs/chain_sum/data/test.jsonl"]}
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return main(["pipeline", "--config", str(FOUR_SERIES), f"out={workspace}/four", *overrides, *more])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"), 60)
    with ChatServer(classroom) as server:
        assert run_four_series(workspace, server.url) == 0
    return workspace


def test_every_step_has_rows(workspace):
    out = workspace / "four"
    problems = counts(out / "collect", "train")["out"]
    said = counts(out, "verify")
    assert 20 < problems <= 30 and (said["correct"], said["incorrect"]) == (3 * problems, problems)
    said = counts(out, "annotate")
    assert said[f"{DIFFICULTY} votes"] == 3 * said["in"] and said[f"{DIFFICULTY} votes missing"] == said["in"]
    assert said[f"{DIFFICULTY} given"] == said["in"] > 4 * problems  # two votes of three are a majority
    assert {row["gap"] for row in read_jsonl(out / "cogpo.jsonl")} == {"small", "medium", "large"}
    for row in read_jsonl(out / "slow.jsonl"):
        assert row["correct"] and row["suitable"] and row["difficulty"] == row[DIFFICULTY]
    adaptive = [row["problem_id"] for row in read_jsonl(out / "adaptive.jsonl")]
    assert len(set(adaptive)) == len(adaptive) == counts(out, "adaptive")["out"] > 20
    for name in ("slow", "adaptive", "labels"):
        assert len({row["problem_id"] for row in read_jsonl(out / f"{name}.validation.jsonl")}) == 1
    assert (out / "stats.html").stat().st_size > 5000


@pytest.mark.parametrize(
    ("config", "files", "more"),
    [
        ("sft", "slow", ("train.steps=null", "data.curriculum={stages: [{below: 5}, {at_least: 5}]}")),
        ("sft", "adaptive", ()),
        ("preference", "cogpo", ()),
        ("reward", "rewards quality", ()),
        ("scorer", "labels", ()),
    ],
)
def test_training_takes_each_file(workspace, config, files, more):
    sources = ", ".join(f"{workspace}/four/{name}.jsonl" for name in files.split())
    own = workspace / f"four/{files}.validation.jsonl"
    held = [f"data.validation={own}"] if own.exists() else []
    assert run(workspace, files, f"data.sources=[{sources}]", *held, *more, config=str(DEBUG / f"{config}.yaml")) == 0
    (first, *_) = read_jsonl(workspace / files / "metrics.jsonl")
    assert first["loss"] > 0


def test_a_trained_scorer_labels_in_place_of_the_judge(workspace, capsys):
    """The scorer that `labels.jsonl` trains; its labels are those of `python -m dqjax.score`."""
    labels, checkpoint = workspace / "four/labels.jsonl", str(workspace / "scorer")
    learn = [f"data.sources={labels}", "data.validation=null", "optimizer.learning_rate=3e-3"]
    assert run(workspace, "scorer", *learn, config=str(DEBUG / "scorer.yaml")) == 0
    rows = [{k: v for k, v in row.items() if k not in (VERBOSITY, DIFFICULTY)} for row in read_jsonl(labels)[:20]]
    asked = workspace / "unlabelled.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bare", "prompt": "1 + 1?"}]))
    shape = ["annotate.scorer={checkpoint: %s, row_length: 256, rows: 2, dtype: float32}" % checkpoint]
    pointed = ["annotate.judge=null", "annotate.votes=1", *shape]
    command = ["annotate", "--config", str(FOUR_SERIES), "--input", str(asked), "--output"]
    assert main([*command, str(workspace / "scored.jsonl"), *pointed]) == 0
    made = read_jsonl(workspace / "scored.jsonl")
    said = counts(workspace, "scored")
    assert said[f"{VERBOSITY} given"] == said[f"{DIFFICULTY} given"] == len(rows) and said["rejected"] == 1
    whole = ["--checkpoint", checkpoint, "--input", str(workspace / "scored.jsonl"), "--row-length", "256"]
    assert score.main([*whole, "--output", str(workspace / "levels.jsonl"), "--dtype", "float32"]) == 0
    for row, level in zip(made, read_jsonl(workspace / "levels.jsonl"), strict=True):
        assert (row[VERBOSITY], row[DIFFICULTY]) == pytest.approx((level["verbosity"], level["difficulty"]), abs=0.006)
        assert {e["by"] for e in row["provenance"] if e["field"] in (VERBOSITY, DIFFICULTY)} == {checkpoint}
    for i in range(2):
        assert main([*command, str(workspace / "parts.jsonl"), "--shard", f"{i}/2", *pointed]) == 0
    assert main(["merge", str(workspace / "parts.jsonl")]) == 0
    labels_of = lambda rows: [value for row in rows for value in (row[VERBOSITY], row[DIFFICULTY])]  # noqa: E731
    assert labels_of(read_jsonl(workspace / "parts.jsonl")) == pytest.approx(labels_of(made), abs=0.011)
    capsys.readouterr()
    short = [*pointed[:2], pointed[2].replace("256", "16")]
    assert main([*command, str(workspace / "short.jsonl"), *short]) == 0
    assert all(VERBOSITY not in row for row in read_jsonl(workspace / "short.jsonl"))
    assert counts(workspace, "short")[f"{VERBOSITY} missing"] == len(rows)
    student = pointed[2].replace(checkpoint, str(workspace / "runs/chain_sum/student"))
    assert main([*command, str(workspace / "x.jsonl"), *pointed[:2], student]) == 2
    assert "holds a language model; expected a reward model or a scorer" in capsys.readouterr().err
