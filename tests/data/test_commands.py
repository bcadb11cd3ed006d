"""python -m dqjax.data: each command on a small case, and what it says when something is wrong."""

import json
import pathlib
import subprocess
import sys

import pytest
import yaml

from dqjax.config import load
from dqjax.data.__main__ import COMMANDS, main
from dqjax.data.collect import CollectConfig, collect
from dqjax.data.config import SourceConfig
from dqjax.data.records import normalise_question
from dqjax.data.sources import read_records
from dqjax.data.tokenizer import load_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
TASK = {"task": "chain_sum", "size": 60, "params": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def question(row):
    turns = row.get("messages", row.get("prompt"))
    return normalise_question(next(m["content"] for m in turns if m["role"] == "user"))


def write_config(tmp_path, **values):
    path = tmp_path / "collect.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "out"), "sources": [TASK]} | values))
    return str(path)


def test_collect_writes_disjoint_splits_with_one_file_a_style(tmp_path, capsys):
    styles = ["columns", "running", "answer"]
    path = write_config(tmp_path, test=7, validation=5, chain_styles=styles)
    assert main(["collect", "--config", path]) == 0
    out = tmp_path / "out"
    assert "test.jsonl" in capsys.readouterr().out
    test = jsonl(out / "test.jsonl")
    assert len(test) == 7 and all(set(row) >= {"id", "prompt", "answer"} and "messages" not in row for row in test)
    sides = [test, jsonl(out / "validation_columns.jsonl"), jsonl(out / "train_columns.jsonl")]
    questions = [{question(row) for row in side} for side in sides]
    assert not (questions[0] & questions[1] or questions[0] & questions[2] or questions[1] & questions[2])
    assert [len(q) for q in questions[:2]] == [7, 5] and len(questions[2]) == len(sides[2])  # duplicates went
    ids = [[row["id"] for row in jsonl(out / f"train_{style}.jsonl")] for style in styles]
    assert ids[0] == ids[1] == ids[2] and len(set(ids[0])) == len(ids[0])
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert main(["collect", "--config", path]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert len(list(read_records(SourceConfig(path=str(out / "train_columns.jsonl"))))) == len(ids[0])


def test_collect_keeps_the_chains_of_a_problem_together(tmp_path, write_rows):
    chains = [{"thought": f"way {k}", "solution": "7"} for k in range(3)]
    source = write_rows([{"id": i, "question": f"{i}+4?", "reasoning": chains} for i in range(20)])
    config = CollectConfig(out=str(tmp_path / "out"), sources=[source], validation=6)
    counts = collect(config)
    assert (counts["train.jsonl"], counts["validation.jsonl"], counts["unusable"]) == (42, 18, 0)
    problems = [
        {row["problem_id"] for row in jsonl(tmp_path / "out" / name)} for name in ("train.jsonl", "validation.jsonl")
    ]
    assert not problems[0] & problems[1]


def test_collect_refuses_and_leaves_the_old_files(tmp_path, capsys):
    path = write_config(tmp_path, test=7, chain_styles=["columns"])
    assert main(["collect", "--config", path]) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert main(["collect", "--config", path, "test=1000"]) == 2
    assert "asked for 1000 test" in capsys.readouterr().err
    assert main(["collect", "--config", path, "tset=3"]) == 2
    assert "tset: unknown key; did you mean test?" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert main(["collect", "--config", str(tmp_path / "none.yaml")]) == 2


def test_the_shipped_config_is_valid():
    config = load(CollectConfig, ROOT / "configs" / "data" / "chain_sum.yaml")
    assert config.test == 200 and config.chain_styles == ("columns", "running", "answer")


def test_tokenizer_command(tmp_path, write_rows, capsys):
    path = write_rows([{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(50)])
    assert main(["tokenizer", "--input", path, "--vocab-size", "300", "--out", str(tmp_path / "t")]) == 0
    assert "tokens from 50 records" in capsys.readouterr().out
    assert len(load_tokenizer(tmp_path / "t", vocab_size=300)) <= 300
    assert main(["tokenizer", "--input", path, "--vocab-size", "3", "--out", str(tmp_path / "t")]) == 2
    assert "--vocab-size: at least 261" in capsys.readouterr().err


def test_inspect(write_rows, qwen3_folder, capsys):
    good = [{"prompt": f"What is {i}+1?", "response": f"<think>\nadd\n</think>\n\n{i + 1}"} for i in range(9)]
    path = write_rows([*good, {"prompt": "x", "response": 3}])
    assert main(["inspect", path, "--tokenizer", str(qwen3_folder), "--row-length", "20", "--show", "2"]) == 0
    said = capsys.readouterr().out
    assert "10; 9 records" in said and "response (10)" in said
    assert "unusable    1: response: expected text or a list of messages, got int" in said
    assert "9 of 9 documents (100.0%)" in said and "9 on, 0 off" in said
    assert "What is 1+1?<|im_end|>\n<|im_start|>assistant\n[[<think>\nadd\n</think>\n\n2<|im_end|>]]" in said
    assert "\x1b" not in said
    assert main(["inspect", path]) == 0
    assert "characters" in capsys.readouterr().out


def test_inspect_of_problems_and_preferences(write_rows, qwen3_folder, capsys):
    main(["inspect", write_rows([{"question": "3+4?", "answer": 7}]), "--tokenizer", str(qwen3_folder)])
    said = capsys.readouterr().out
    assert "answer (1)" in said and "prompts " in said and "no document 1: no answer to train on" in said
    pair = {"prompt": "3+4?", "chosen": "It is 7.", "rejected": "8"}
    main(["inspect", write_rows([pair]), "--tokenizer", str(qwen3_folder)])
    said = capsys.readouterr().out
    assert "preference (1)" in said and "of 2 documents" in said and "[[It is 7.<|im_end|>]]" in said


def test_the_exit_code_of_the_command_itself(tmp_path):
    argv = [sys.executable, "-m", "dqjax.data", "inspect", str(tmp_path / "none.jsonl")]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no data file" in done.stderr and "Traceback" not in done.stderr


def test_inspect_colours_on_a_terminal(write_rows, qwen3_folder, capsys, monkeypatch):
    path = write_rows([{"prompt": "What?", "response": "This."}])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    main(["inspect", path, "--tokenizer", str(qwen3_folder)])
    assert "\x1b[32mThis.<|im_end|>\x1b[0m" in capsys.readouterr().out


def test_inspect_mistakes(write_rows, tmp_path, capsys):
    for argv, said in [
        (["inspect", str(tmp_path / "none.jsonl")], "no data file at"),
        (["inspect", write_rows([b""], "empty.jsonl")], "no rows"),
        (["inspect", write_rows([{"a": 1}]), "--tokenizer", str(tmp_path / "x")], "no tokenizer at"),
        (["inspect", write_rows([{"a": 1}]), "--row-length", "0"], "row_length"),
    ]:
        assert main(argv) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"python -m dqjax.data {command} " in capsys.readouterr().out


def test_importing_the_data_modules_starts_no_backend_and_no_flax():
    modules = sorted(f"dqjax.data.{p.stem}" for p in (ROOT / "dqjax" / "data").glob("*.py"))
    code = (
        f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; "
        "import jax._src.xla_bridge as b; assert not b.backends_are_initialized(); assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
