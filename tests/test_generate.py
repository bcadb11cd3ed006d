"""python -m dqjax.generate, on a run folder and on a Hugging Face folder."""

import json

import numpy as np
import pytest

from dqjax import generate, train
from dqjax.commands import run_command
from dqjax.convert.__main__ import main as convert
from tests.workspace import DEBUG, make_workspace, overrides


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = make_workspace(tmp_path_factory.mktemp("workspace"))
    more = overrides(folder, "run", "train.sample_tokens=0")
    assert run_command(lambda: train.main(["--config", str(DEBUG / "sft.yaml"), *more])) == 0
    assert run_command(lambda: convert(["to-hf", str(folder / "run"), str(folder / "export"), "--dtype", "float32"])) == 0
    return folder


def run(capsys, *arguments):
    capsys.readouterr()
    code = run_command(lambda: generate.main(["--dtype", "float32", "--max-new-tokens", "12", *arguments]))
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_a_run_and_its_export_say_the_same_as_transformers(workspace, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = str(workspace / "runs/chain_sum/data/test.jsonl")
    arguments = ("--prompts", prompts, "--temperature", "0", "--rows", "8")
    code, ours, err = run(capsys, "--checkpoint", str(workspace / "run"), *arguments)
    assert code == 0, err
    assert run(capsys, "--checkpoint", str(workspace / "export"), *arguments)[1] == ours
    assert len(ours) == 16 and len({row["id"] for row in ours}) == 16

    model = AutoModelForCausalLM.from_pretrained(workspace / "export", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(workspace / "export")
    for row, line in zip(ours, open(prompts)):
        messages = json.loads(line)["prompt"]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        assert tokenizer.decode(ids["input_ids"][0]) == row["prompt"]
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
        assert row["token_ids"] == out
        assert row["finish_reason"] == ("stop" if out[-1] in model.generation_config.eos_token_id else "length")


def test_samples_thinking_and_raw(workspace, capsys):
    checkpoint = ("--checkpoint", str(workspace / "run"), "--prompt", "1 + 2 =")
    _, several, _ = run(capsys, *checkpoint, "--samples", "3", "--temperature", "1")
    assert [row["id"].rsplit("/")[-1] for row in several] == ["0", "1", "2"]
    assert len({tuple(row["token_ids"]) for row in several}) == 3
    assert run(capsys, *checkpoint, "--samples", "3", "--temperature", "1")[1] == several
    assert run(capsys, *checkpoint, "--samples", "3", "--temperature", "1", "--seed", "1")[1] != several
    off = run(capsys, *checkpoint, "--thinking", "off")[1][0]
    assert off["prompt"].endswith("<think>\n\n</think>\n\n")
    assert run(capsys, *checkpoint, "--raw")[1][0]["prompt"] == "1 + 2 ="


def test_a_thinking_budget_a_stop_string_and_a_small_cache(workspace, capsys):
    checkpoint = ("--checkpoint", str(workspace / "run"), "--prompt", "1 + 2 =", "--samples", "3")
    plain = run(capsys, *checkpoint)[1]
    assert run(capsys, *checkpoint, "--cache-gib", "0.001")[1] == plain
    for row in run(capsys, *checkpoint, "--thinking-budget", "2")[1]:
        start, stop = row["forced"]
        assert start == 2 and row["text"].partition("</think>")[1]
    assert not any("forced" in row for row in run(capsys, *checkpoint, "--thinking-budget", "2", "--thinking", "off")[1])
    middle = plain[0]["text"][4:7]
    cut = run(capsys, *checkpoint, "--stop", middle)[1][0]
    assert cut["text"] == plain[0]["text"].partition(middle)[0] and cut["finish_reason"] == "stop"
    assert cut["token_ids"] == plain[0]["token_ids"][: len(cut["token_ids"])] and middle not in cut["text"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "nowhere", "--prompt", "x"), "no model at nowhere"),
        (("--checkpoint", "RUN", "--prompt", "x", "--temperature", "-1"), "--temperature: expected at least 0, got -1"),
        (("--checkpoint", "RUN", "--prompt", "x", "--step", "77"), "no complete checkpoint of step 77"),
        (("--checkpoint", "RUN", "--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--checkpoint", "RUN", "--prompt", "x", "--max-new-tokens", "0"), "expected at least 1"),
        (("--checkpoint", "RUN", "--prompt", "x", "--thinking-budget", "-1"), "--thinking-budget: expected at least 0"),
        (("--checkpoint", "RUN", "--prompt", "x", "--stop", ""), "--stop: expected some text"),
        (("--checkpoint", "RUN", "--prompt", "x", "--cache-gib", "0.00001"), "raise the budget"),
    ],
)
def test_bad_input_is_one_line(workspace, capsys, arguments, message):
    code, rows, err = run(capsys, *(str(workspace / "run") if a == "RUN" else a for a in arguments))
    assert code in (1, 2) and not rows
    assert message in err.splitlines()[-1]


def test_a_bad_row_is_named(workspace, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 + 1 ="}\n{"prompt": 3}\n')
    code, rows, err = run(capsys, "--checkpoint", str(workspace / "run"), "--prompts", str(path))
    assert code == 2 and not rows
    assert "prompts.jsonl:2" in err
