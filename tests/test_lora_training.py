"""Adapters as users train them: the base stays, the run resumes, and both exports say what the run does."""

import json
import shutil

import numpy as np
import pytest

from dqjax import score
from dqjax.commands import run_command
from dqjax.convert.__main__ import main as convert
from dqjax.convert.tensor_file import read_header
from tests.test_train import DEBUG, curve, parameters, run
from tests.workspace import make_workspace

LORA = ("lora={rank: 4, alpha: 8}", "checkpoint.every=1", "optimizer.learning_rate=1e-2")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def config(name):
    return str(DEBUG / f"{name}.yaml")


@pytest.fixture(scope="module")
def trained(workspace):
    assert run(workspace, "sft", *LORA, config=config("sft")) == 0
    return workspace / "sft"


def logits(folder, peft_folder=None):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    if peft_folder is not None:
        model = pytest.importorskip("peft").PeftModel.from_pretrained(model, peft_folder)
    with torch.no_grad():
        return model.eval()(torch.arange(5, 40)[None]).logits.numpy()


def test_only_the_adapters_are_kept_and_a_resumed_run_ends_in_the_same_bits(workspace, trained):
    shutil.copytree(trained, workspace / "resumed")
    shutil.rmtree(workspace / "resumed/checkpoints/step_00000002")
    assert run(workspace, "resumed", *LORA, config=config("sft")) == 0
    assert curve(workspace / "resumed") == curve(trained)
    (_, again), (_, leaves) = parameters(workspace / "resumed"), parameters(trained)
    for a, b in zip(again, leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert max(x.size for x in map(np.asarray, leaves)) <= 3 * 384 * 4  # [L, F, R], nothing of the base


def test_the_merged_export_and_peft_say_the_same(workspace, trained):
    base, merged, adapter = workspace / "runs/chain_sum/student", workspace / "merged", workspace / "adapter"
    assert convert(["to-hf", str(trained), str(merged), "--dtype", "float32"]) == 0
    assert convert(["to-peft", str(trained), str(adapter)]) == 0
    found = logits(merged)
    assert np.abs(found - logits(base)).max() > 1e-2
    np.testing.assert_allclose(logits(base, adapter), found, rtol=1e-4, atol=1e-4)


def test_the_adapter_has_pefts_names_and_shapes(workspace, trained):
    assert convert(["to-peft", str(trained), str(workspace / "names"), "--base", "org/base"]) == 0
    stored = read_header(workspace / "names/adapter_model.safetensors")
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    attention, mlp = "base_model.model.model.layers.2.self_attn", "base_model.model.model.layers.0.mlp"
    assert len(shapes) == 3 * 7 * 2
    assert (shapes[f"{attention}.q_proj.lora_A.weight"], shapes[f"{attention}.q_proj.lora_B.weight"]) == (
        (4, 128),
        (128, 4),
    )
    assert (shapes[f"{attention}.k_proj.lora_A.weight"], shapes[f"{attention}.k_proj.lora_B.weight"]) == (
        (4, 128),
        (64, 4),
    )
    assert (shapes[f"{mlp}.down_proj.lora_A.weight"], shapes[f"{mlp}.down_proj.lora_B.weight"]) == ((4, 384), (128, 4))
    values = json.loads((workspace / "names/adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["task_type"]) == (4, 8, "CAUSAL_LM")
    assert values["base_model_name_or_path"] == "org/base" and "down_proj" in values["target_modules"]


def test_a_run_goes_on_from_adapters_as_from_any_model(workspace, trained):
    """Continued with the weights, what was trained with adapters starts where it stood."""
    assert run(workspace, "more", f"model.init_from={trained}", "train.steps=1", config=config("sft")) == 0
    assert run(workspace, "fresh", "train.steps=1", config=config("sft")) == 0
    assert curve(workspace / "more")[1][0] < curve(workspace / "fresh")[1][0] - 0.05


@pytest.mark.parametrize("kind", ["preference", "reward", "scorer", "distill", "grpo"])
def test_other_objectives_train_adapters_too(workspace, kind):
    assert run(workspace, kind, *LORA, config=config(kind)) == 0
    assert all(np.isfinite(values).all() for values in curve(workspace / kind).values())


def test_a_reward_model_of_adapters_scores_as_its_exports(workspace):
    run_dir, merged = workspace / "scored", workspace / "scored_export"
    assert run(workspace, "scored", *LORA, config=config("reward")) == 0
    assert convert(["to-hf", str(run_dir), str(merged), "--dtype", "float32"]) == 0
    pairs = workspace / "few.jsonl"
    pairs.write_text("".join((workspace / "runs/chain_sum/data/pairs.jsonl").read_text().splitlines(keepends=True)[:4]))
    found = []
    for checkpoint in (run_dir, merged):
        out = workspace / "scores.jsonl"
        command = ["--checkpoint", str(checkpoint), "--input", str(pairs), "--output", str(out), "--dtype", "float32"]
        assert run_command(lambda: score.main([*command, "--row-length", "512"])) == 0  # noqa: B023
        found.append([json.loads(line)["score_chosen"] for line in out.read_text().splitlines()])
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
    assert convert(["to-peft", str(run_dir), str(workspace / "scored_adapter")]) == 0
    assert "base_model.model.score.weight" in read_header(workspace / "scored_adapter/adapter_model.safetensors")


def test_a_run_of_whole_weights_has_no_adapters(workspace, capsys):
    assert run(workspace, "whole", "train.steps=1", config=config("sft")) == 0
    assert convert(["to-peft", str(workspace / "whole"), str(workspace / "nothing")]) == 2
    assert "holds no adapters" in capsys.readouterr().err
