"""Imports run one way, and only where the design says: read from the source, nothing is imported."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# What each part of dqjax may import from dqjax. The commands at the end construct models and wire the rest together.
BASE = {"types", "config", "sharding"}
ALLOWED = {
    "types": set(),
    "config": set(),
    "sharding": {"config"},
    "commands": {"config"},
    "topology": {"config"},
    "kernels": {"kernels"},
    "models": {"models", "kernels"} | BASE,
    "rollout": {"rollout", "models", "kernels"} | BASE,
    "convert": {"convert", "models", "checkpoint", "data"} | BASE,
    "losses": {"losses", "kernels"} | BASE,
    "steps": {"steps", "losses"} | BASE,
    "optim": BASE,
    "checkpoint": BASE,
    "metrics": BASE,
    "trainer": {"steps", "checkpoint", "metrics", "data"} | BASE,
    "rewards": {"rewards"} | BASE,
    "data": {"data", "rewards"} | BASE,
    "eval": {"eval", "rewards", "data"} | BASE,
}
COMMANDS = {"train", "train_config", "objectives", "generate", "score", "scoring", "teacher_logits", "plan", "load", "bench", "__init__"}
# These import what they compare with, where it is installed.
PEERS = {"kernels.measure", "kernels.attention_peers", "kernels.vocabulary_peers", "bench.peers"}
COMMAND_MODULES = {"eval.__main__", "data.__main__", "convert.__main__", "bench.__main__"}


def modules():
    for folder, prefix in ((ROOT / "dqjax", ""), (ROOT / "kernels", "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [prefix] if prefix else []
            parts += list(path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts), path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("name", "path"), [pytest.param(n, p, id=n) for n, p in modules()])
def test_imports_follow_the_layers(name, path):
    part = name.split(".")[0]
    for target in imported(path):
        root = target.split(".")[0]
        if root == "flax":
            assert part == "models", f"{name} imports flax; only models/ may"
        if root == "torch":
            assert name in PEERS, f"{name} imports torch, which is for tests and for the benchmarks' peers"
        if root != "dqjax" or target in ("dqjax", "dqjax.__version__"):
            continue
        inner = target.split(".")[1]
        if part in COMMANDS or name in COMMAND_MODULES:
            continue
        assert inner in ALLOWED[part], f"{name} imports {target}; {part} may import {sorted(ALLOWED[part])}"


def test_every_part_is_known():
    parts = {name.split(".")[0] for name, _ in modules()}
    assert parts <= ALLOWED.keys() | COMMANDS


def test_transformers_imports_from_the_root():
    """transformers looks for a distribution called `kernels`; our folder of that name must not disturb it."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""
    code = "import transformers; from transformers import Qwen3Config, AutoTokenizer; print(Qwen3Config().model_type)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "qwen3", done.stderr


def test_importing_the_package_starts_no_backend():
    code = (
        "import dqjax.types, dqjax.config, dqjax.sharding, dqjax.data.config, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, xla_bridge._backends"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
