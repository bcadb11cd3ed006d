"""A small world for tests of the commands: chain_sum data, a tokenizer, a student, and configs/debug pointed at them."""

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
    return folder


def overrides(workspace: pathlib.Path, run: str, *more: str) -> list[str]:
    """Overrides that point a debug config at a workspace and its run at `workspace/run`."""
    base = workspace / "runs/chain_sum"
    return [
        f"model.init_from={base}/student",
        f"data.sources={base}/data/train_columns.jsonl",
        f"data.cache_dir={workspace}/cache",
        f"train.run_dir={workspace / run}",
        *more,
    ]
