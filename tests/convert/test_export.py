"""python -m dqjax.convert: what goes in comes out, and transformers serves it."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import dqjax
from dqjax.checkpoint import Checkpoints
from dqjax.convert.__main__ import main
from dqjax.convert.checkpoint import open_checkpoint
from dqjax.convert.huggingface import load_params
from dqjax.convert.serving import generation_config, thinking_mode
from dqjax.convert.source import resolve_model
from dqjax.models.config import SIZES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

RESEARCH = "Qwen RESEARCH LICENSE AGREEMENT\n\nQwen RESEARCH LICENSE AGREEMENT Release Date: September 19, 2024\n"


def convert(folder, tmp_path, *options):
    assert main(["from-hf", str(folder), str(tmp_path / "checkpoint")]) == 0
    assert main(["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out"), *options]) == 0
    return tmp_path / "out"


def as_run(converted, run, config):
    """A run folder, made of a converted checkpoint."""
    shutil.copytree(converted, run)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return run


CASES = [(family, tied) for family in ("llama", "qwen2", "qwen3") for tied in (True, False)]

LOAD = """
import pathlib, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in map(pathlib.Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    logits = model(torch.arange(40)[None] * 7).logits
    torch.save((logits, model.generation_config.eos_token_id), folder.parent / "loaded")
"""


def test_transformers_loads_the_export(folder_of, make_model, tmp_path):
    """Every tensor bit for bit, hence equal logits; weights, configs and tokenizer without a word of warning."""
    exports = {}
    for family, tied in CASES:
        folder, place = folder_of(family, tied, serving=True), tmp_path / f"{family}-{tied}"
        out = exports[family, tied] = convert(folder, place, "--dtype", "float32")
        before, after = (safetensors.load_file(f / "model.safetensors") for f in (folder, out))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    env = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOAD, *exports.values()]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr
    for (family, tied), out in exports.items():
        logits, stops = torch.load(out.parent / "loaded")
        with torch.no_grad():
            assert torch.equal(logits, make_model(family, tied)(torch.arange(40)[None] * 7).logits)
        assert stops == json.loads((out / "generation_config.json").read_text())["eos_token_id"]


def test_bfloat16_round_trip_is_bit_exact(folder_of, tmp_path):
    folder = folder_of(dtype="bfloat16", serving=True)
    out = convert(folder, tmp_path)
    before, after = (safetensors.load_file(f / "model.safetensors") for f in (folder, out))
    assert all(after[k].dtype == torch.bfloat16 and torch.equal(before[k], after[k]) for k in before)


def test_everything_a_server_needs_is_there(folder_of, tokenizer, tmp_path):
    folder = folder_of(serving=True)
    out = convert(folder, tmp_path)
    for path in folder.glob("tokenizer*"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert (out / "LICENSE").read_bytes() == (folder / "LICENSE").read_bytes()
    ids = tokenizer.get_vocab()
    end, text_end = ids["<|im_end|>"], ids["<|endoftext|>"]
    generation = json.loads((out / "generation_config.json").read_text())
    del generation["transformers_version"]
    assert generation == {
        "pad_token_id": text_end,
        "eos_token_id": [end, text_end],
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
    }
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (end, text_end, None)
    assert config["dtype"] == "bfloat16" and config["rope_parameters"]["rope_theta"] == 10000.0
    assert not list(tmp_path.glob(".*"))


def test_a_model_that_does_not_think_keeps_its_sampling(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "repetition_penalty": 1.05, "top_p": null}')
    values = generation_config(tmp_path, {"stop": [3, 2], "pad": 2}, "none")
    chosen = [values[k] for k in ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "eos_token_id")]
    assert chosen == [True, 0.5, 0.8, 20, 1.05, [3, 2]]
    assert "repetition_penalty" not in generation_config(tmp_path, {"stop": [3, 2], "pad": 2}, "always")
    assert [thinking_mode(t) for t in ("", "{{ messages }}", "<think>", "enable_thinking <think>")] == [
        "none", "none", "always", "hybrid",
    ]  # fmt: skip


def test_the_card_of_a_run(folder_of, tmp_path):
    folder = folder_of(serving=True)
    assert main(["from-hf", str(folder), str(tmp_path / "checkpoint")]) == 0
    data = {"sources": ["data/omni.jsonl", {"hub": "org/thoughts"}, {"task": "chain_sum", "name": "sums"}]}
    config = {"objective": {"kind": "sft"}, "model": {"init_from": "Qwen/Qwen3-0.6B"}, "data": data}
    run = as_run(tmp_path / "checkpoint", tmp_path / "run", config)
    assert main(["to-hf", str(run), str(tmp_path / "my-student"), "--teacher", "R1", "--teacher", "QwQ-32B"]) == 0
    card = (tmp_path / "my-student" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "apache-2.0" and front["base_model"] == "Qwen/Qwen3-0.6B"
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == config
    for said in (
        "# my-student",
        "| Base | Qwen/Qwen3-0.6B |",
        "Apache License 2.0 (recognised by LICENSE)",
        "| Teachers | R1, QwQ-32B |",
        "| Data | omni.jsonl, org/thoughts, sums |",
        "enable_thinking=False",
        "temperature 0.6, top_p 0.95, top_k 20",
        f"dqjax {dqjax.__version__}, checkpoint of step 0",
    ):
        assert said in body, said
    assert "Research use only" not in card


def test_the_card_of_a_model_without_a_base(folder_of, tmp_path, capsys):
    assert main(["from-hf", str(folder_of()), str(tmp_path / "checkpoint")]) == 0
    run = as_run(tmp_path / "checkpoint", tmp_path / "run", {"model": {"size": "miniature"}})
    capsys.readouterr()
    assert main(["to-hf", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "none: trained from random parameters" in card and "none: no base" in card and "license:" not in card
    assert "NOTE" not in capsys.readouterr().err


@pytest.mark.parametrize("told_by", ["LICENSE", "README.md", "shape"])
def test_a_research_licence_is_said(folder_of, tmp_path, capsys, monkeypatch, told_by):
    folder = folder_of("qwen2")
    if told_by == "LICENSE":
        (folder / "LICENSE").write_text(RESEARCH)
    elif told_by == "README.md":
        (folder / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\n---\n# Qwen2.5-3B\n")
    else:
        config = resolve_model(folder).config()
        monkeypatch.setitem(SIZES, "qwen2.5-3b", config)
    assert main(["from-hf", str(folder), str(tmp_path / "checkpoint")]) == 0
    assert "Qwen Research License" in capsys.readouterr().err
    assert main(["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "out")]) == 0
    assert "research and evaluation only" in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Research use only.**" in card and "license_name: qwen-research" in card


def test_a_missing_licence_is_said(folder_of, tmp_path, capsys):
    assert main(["from-hf", str(folder_of()), str(tmp_path / "checkpoint")]) == 0
    assert "no licence came with the base" in capsys.readouterr().err


def test_the_step_is_chosen(folder_of, tmp_path):
    assert main(["from-hf", str(folder_of()), str(tmp_path / "run")]) == 0
    source = resolve_model(tmp_path / "run")
    params = load_params(folder_of(), source.config(), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=5)
    checkpoints.save(7, {"params": params | {"final_norm": {"scale": jnp.full(48, 7.0)}}, "opt_state": {"mu": jnp.zeros(2)}}, {})
    checkpoints.close()
    for step, options in ((0, ("--step", "0")), (7, ())):
        out = tmp_path / f"out{step}"
        assert main(["to-hf", str(tmp_path / "run"), str(out), "--dtype", "float32", *options]) == 0
        scale = safetensors.load_file(out / "model.safetensors")["model.norm.weight"]
        assert bool((scale == 7).all()) == (step == 7)
    assert main(["to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--step", "3"]) == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(folder_of, tmp_path, capsys):
    assert main(["from-hf", str(folder_of()), str(tmp_path / "c")]) == 0
    files = sorted((tmp_path / "c/checkpoints/step_00000000/params").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
    data = bytearray(files[-1].read_bytes())
    data[len(data) // 2] ^= 4
    files[-1].write_bytes(data)
    assert main(["to-hf", str(tmp_path / "c"), str(tmp_path / "out")]) == 1
    assert str(files[-1]) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parameters_are_read_one_by_one(folder_of, tmp_path):
    assert main(["from-hf", str(folder_of(dtype="bfloat16")), str(tmp_path / "c")]) == 0
    step, read = open_checkpoint(resolve_model(tmp_path / "c"))
    leaf = read(("layers", "mlp", "up", "kernel"))
    assert step == 0 and isinstance(leaf, np.ndarray) and leaf.dtype == jnp.bfloat16 and leaf.shape == (3, 48, 80)


def test_bad_input_is_one_line(folder_of, tmp_path, capsys):
    folder = folder_of()

    def fails(code, said, *argv):
        assert main([str(a) for a in argv]) == code
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error, error

    fails(2, "no model at", "from-hf", tmp_path / "nowhere", tmp_path / "out")
    fails(2, "exists and is not an empty folder", "from-hf", folder, folder)
    fails(2, "is a Hugging Face folder already", "to-hf", folder, tmp_path / "out")
    (folder / "model.safetensors").write_bytes(b"12345678")
    fails(1, "model.safetensors is truncated or corrupt", "from-hf", folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    fails(2, "config.json is not valid JSON", "from-hf", folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_sources_are_told_apart(folder_of, tmp_path):
    folder = folder_of()
    assert (resolve_model(folder).kind, resolve_model(folder).files) == ("huggingface", folder)
    assert main(["from-hf", str(folder), str(tmp_path / "c")]) == 0
    assert (resolve_model(tmp_path / "c").kind, resolve_model(tmp_path / "c").files) == ("converted", tmp_path / "c" / "model")
    run = as_run(tmp_path / "c", tmp_path / "run", {})
    assert resolve_model(run).kind == "run"
    assert resolve_model(run).config() == resolve_model(folder).config()
    with pytest.raises(ValueError, match=f"give the run folder, {run}, and choose a checkpoint"):
        resolve_model(run / "checkpoints" / "step_00000000")
