"""A small world for tests of the commands: chain_sum data, a tokenizer, a student, and configs/debug pointed at them."""

import json
import pathlib
import shutil

from dqjax.convert.new import new_student
from dqjax.data.__main__ import main as data_command

ROOT = pathlib.Path(__file__).parent.parent
DEBUG = ROOT / "configs" / "debug"


def make_workspace(folder: pathlib.Path, problems: int = 240) -> pathlib.Path:
    """Writes runs/chain_sum/{data,tokenizer,student} below `folder`, as the quickstart does, only smaller."""
    config = folder / "chain_sum.yaml"
    shutil.copyfile(ROOT / "configs" / "data" / "chain_sum.yaml", config)
    text = config.read_text().replace("31000", str(problems + 80)).replace("30000", str(problems))
    config.write_text(text.replace("200", "16").replace("out: runs", f"out: {folder}/runs"))
    assert data_command(["collect", "--config", str(config)]) == 0
    data = folder / "runs/chain_sum/data/train_columns.jsonl"
    out = folder / "runs/chain_sum/tokenizer"
    assert data_command(["tokenizer", "--input", str(data), "--vocab-size", "320", "--out", str(out)]) == 0
    new_student("miniature", out, folder / "runs/chain_sum/student")
    write_pairs(data, data.with_name("pairs.jsonl"))
    write_labels(data, data.with_name("labels.jsonl"))
    return folder


def write_pairs(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes a preference pair for each conversation: its answer against one that is not what the chain reaches."""
    with target.open("w") as file:
        for i, line in enumerate(source.read_text().splitlines()):
            row = json.loads(line)
            *prompt, right = row["messages"]
            wrong = right | {"content": str(int(right["content"]) + (-1) ** i * (1 + i % 9))}
            pair = {"prompt": prompt, "chosen": [right], "rejected": [wrong], "beta": (0.1, 0.2, 0.5)[i % 3]}
            file.write(json.dumps({"id": row["id"], **pair}) + "\n")


def write_labels(source: pathlib.Path, target: pathlib.Path) -> None:
    """Writes the conversations with a verbosity that grows with the chain, and a difficulty for every other one."""
    with target.open("w") as file:
        for i, line in enumerate(source.read_text().splitlines()):
            row = json.loads(line)
            row["Reasoning_Verbosity"] = min(9, len(row["messages"][-1]["reasoning_content"]) // 20)
            if i % 2:
                row["Cognitive_Difficulty"] = i % 10
            file.write(json.dumps(row) + "\n")


DATA = {"scorer": "labels.jsonl", "reward": "pairs.jsonl", "preference": "pairs.jsonl"}


def overrides(workspace: pathlib.Path, run: str, *more: str, config: str = "sft") -> list[str]:
    """Overrides that point the debug config of this name at a workspace and its run at `workspace/run`."""
    base = workspace / "runs/chain_sum"
    return [
        f"model.init_from={base}/student",
        f"data.sources={base}/data/{DATA.get(config, 'train_columns.jsonl')}",
        f"data.cache_dir={workspace}/cache",
        f"train.run_dir={workspace / run}",
        *([f"objective.teachers=[{base}/student]"] if config == "distill" else []),
        *more,
    ]
