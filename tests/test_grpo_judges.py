"""Rewards of trained classifiers: a policy's samples are scored as `python -m dqjax.score` scores them."""

import json
import math

import pytest

from dqjax import score
from dqjax.commands import run_command
from dqjax.data.chat import parse_response
from tests.test_grpo_training import lines
from tests.test_grpo_training import run as run_grpo
from tests.test_train import DEBUG, run
from tests.workspace import make_workspace

TERMS = (
    "objective.reward.verbosity={weight: 0.5}",
    "objective.reward.difficulty={weight: 0.5, correct_only: false}",
    "objective.reward.model={weight: 0.25}",
    "objective.reward.style.verbosity=3",
    "objective.table=4",
    "train.steps=1",
    "data.validation=null",
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = make_workspace(tmp_path_factory.mktemp("workspace"))
    rate = "optimizer.learning_rate=3e-3"  # two steps that leave the fresh head's scores of zero
    for kind in ("scorer", "reward"):
        assert run(workspace, kind, rate, "data.validation=null", config=str(DEBUG / f"{kind}.yaml")) == 0
    return workspace


def checkpoints(workspace):
    return (
        f"objective.reward.style.scorer={workspace}/scorer",
        f"objective.reward.reward_model.checkpoint={workspace}/reward",
    )


def scored(workspace, checkpoint, samples):
    """What the command says of the samples that are whole conversations."""
    asked = workspace / f"asked-{checkpoint}.jsonl"
    with asked.open("w") as file:
        for i, row in enumerate(samples):
            response = parse_response(row["text"])
            said = {"role": "assistant", "content": response.answer}
            said |= {} if response.thinking is None else {"reasoning_content": response.thinking}
            messages = [{"role": "user", "content": row["question"]}, said]
            file.write(json.dumps({"id": str(i), "messages": messages}) + "\n")
    out = workspace / f"scores-{checkpoint}.jsonl"
    command = ["--checkpoint", str(workspace / checkpoint), "--input", str(asked), "--output", str(out)]
    assert run_command(lambda: score.main([*command, "--row-length", "256", "--dtype", "float32"])) == 0
    return lines(out)


def test_samples_are_scored_as_the_command_scores_them(workspace):
    assert run_grpo(workspace, "judged", *TERMS, *checkpoints(workspace)) == 0
    (logged,) = lines(workspace / "judged" / "metrics.jsonl")
    samples = lines(workspace / "judged" / "rollouts.jsonl")
    whole = [row for row in samples if not row["truncated"] and parse_response(row["text"]).closed]
    assert 0 < len(whole) <= len(samples) == 16
    assert logged["reward_failed/model"] == 1 - len(whole) / 16
    # A fresh student is never right, so the style term that is for right samples only has not counted.
    assert logged["accuracy"] == logged["reward_counted/verbosity"] == 0 < logged["reward/verbosity"]
    assert logged["reward_counted/difficulty"] == logged["reward_counted/model"] == len(whole) / 16
    plain = [row for row in whole if "think>" not in row["text"]]  # a file's reader would split an answer at a stray tag
    levels, rewards = scored(workspace, "scorer", plain), scored(workspace, "reward", plain)
    for row, level, reward in zip(plain, levels, rewards, strict=True):
        difficulty, model = 1 - abs(level["difficulty"] - 4) / 9, 1 / (1 + math.exp(-reward["score"]))
        overlong = -row["tokens"] / 64  # limit and buffer of the debug config
        assert row["reward"] == pytest.approx(0.5 * difficulty + 0.25 * model + overlong, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("objective.reward.model={weight: 1}",), "objective.reward.reward_model.checkpoint: model needs a run folder of"),
        (
            ("objective.reward.model={weight: 1}", "objective.reward.reward_model.checkpoint={}/scorer"),
            "scorer has the labels verbosity_0",
        ),
        (
            ("objective.reward.difficulty={weight: 1}", "objective.reward.style.scorer={}/reward"),
            "reward has the labels reward, not those of a scorer",
        ),
        (
            ("objective.reward.model={weight: 1}", "objective.reward.reward_model.checkpoint={}/runs/chain_sum/student"),
            "holds a language model; expected a reward model",
        ),
    ],
)
def test_another_checkpoint_is_refused(workspace, capsys, overrides, message):
    overrides = [o.replace("={}", f"={workspace}") for o in overrides]
    assert run_grpo(workspace, "refused", *overrides) == 2
    assert message in capsys.readouterr().err
