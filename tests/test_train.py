"""The training command as users run it: its files, its errors, kills, resumption."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from dqjax import train
from dqjax.checkpoint import Checkpoints
from dqjax.commands import run_command
from dqjax.trainer import announce_compilation
from tests.workspace import DEBUG, ROOT, make_workspace, overrides

SFT = str(DEBUG / "sft.yaml")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def run(workspace, name, *more, config=SFT):
    pointed = overrides(workspace, name, *more, config=pathlib.Path(config).stem)
    return run_command(lambda: train.main(["--config", config, *pointed]))


def spawn(workspace, name, *more, **environment):
    command = [sys.executable, "-m", "dqjax.train", "--config", SFT, *overrides(workspace, name, *more)]
    env = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def curve(folder):
    """Loss by step, and what was written twice or out of order."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in rows if "loss" in r]
    assert steps == sorted(set(steps)), "a step was recorded twice or out of order"
    return {r["step"]: (r["loss"], r["gradient_norm"]) for r in rows if "loss" in r}


def parameters(folder):
    with np.printoptions():
        checkpoints = Checkpoints(folder / "checkpoints")
        step = checkpoints.steps()[-1]
        restored = checkpoints._orbax.restore(checkpoints.path(step))
    return step, jax.tree.leaves(restored["params"]) + jax.tree.leaves(restored["optimizer"])


@pytest.mark.parametrize("config", sorted(p.name for p in DEBUG.glob("*.yaml")))
def test_pulse(workspace, config):
    """Two steps of every debug config leave a whole run folder."""
    assert run(workspace, f"pulse-{config}", config=str(DEBUG / config)) == 0
    folder = workspace / f"pulse-{config}"
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "model/config.json", "model/tokenizer.json"):
        assert (folder / name).exists(), name
    assert (folder / "samples.jsonl").exists() == (config not in ("reward.yaml", "scorer.yaml"))  # those write no text
    assert Checkpoints(folder / "checkpoints").steps() == [2]
    assert list(curve(folder)) == [1, 2]
    assert run(workspace, f"pulse-{config}", config=str(DEBUG / config)) == 0  # nothing left to do is no error


LONG = ("train.steps=16", "checkpoint.every=3", "train.eval_every=8", "train.sample_tokens=4")


def test_resume_equals_uninterrupted_under_sigkill(workspace):
    """Killed at random moments, also in the middle of saves, the curve and the last state are those of one run."""
    process = spawn(workspace, "whole", *LONG)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    rng, kills = random.Random(0), 0
    while True:
        process = spawn(workspace, "killed", *LONG)
        file = workspace / "killed" / "metrics.jsonl"
        seen = file.read_text().count("\n") if file.exists() else 0
        target = seen + rng.choice([2, 4, 5])
        while process.poll() is None and kills < 4:
            if file.exists() and file.read_text().count("\n") >= target:
                time.sleep(rng.random() * 0.2)
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        output, _ = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    assert kills >= 3
    assert curve(workspace / "killed") == curve(workspace / "whole")
    for a, b in zip(parameters(workspace / "killed")[1], parameters(workspace / "whole")[1], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_sigterm_saves_and_the_same_command_goes_on(workspace):
    process = spawn(workspace, "term", "train.steps=4000", "checkpoint.every=4000", "train.eval_every=4000")
    file = workspace / "term" / "metrics.jsonl"
    while not (file.exists() and file.read_text().count("\n") >= 2) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "the same command goes on from there" in output
    (step,) = Checkpoints(workspace / "term" / "checkpoints").steps()
    assert step >= 2


def test_a_damaged_checkpoint_gives_way_to_the_one_before(workspace, capsys):
    assert run(workspace, "damaged", "train.steps=4", "checkpoint.every=2") == 0
    folder = workspace / "damaged" / "checkpoints" / "step_00000004"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    before = curve(workspace / "damaged")
    assert run(workspace, "damaged", "train.steps=4", "checkpoint.every=2") == 0
    said = capsys.readouterr().err
    assert largest.name in said and "going back" in said
    assert curve(workspace / "damaged") == before
    assert Checkpoints(workspace / "damaged" / "checkpoints").intact_step() == 4  # written anew


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rte=1", "optimizer.learning_rte: unknown key; did you mean learning_rate?"),
        ("train.batch_rows=6", "train.batch_rows: 6 rows do not divide into 8 batch shards of the mesh"),
        ("train.accumulate=3", "expected a multiple of 24"),
        ("mesh.tensor=3", "mesh: 8 devices cannot be split"),
        ("data.sources=nowhere.jsonl", "nowhere.jsonl"),
        ("train.epochs=3", "give one of train.steps, train.epochs"),
        ("objective=stf", "objective"),
        ("model.init_from=nowhere", "no model at nowhere"),
    ],
)
def test_bad_configuration_stops_before_anything_is_compiled(workspace, capsys, monkeypatch, override, message):
    def compiled(*_, **__):
        raise AssertionError("reached compilation")

    monkeypatch.setattr(train, "make_step", compiled)
    assert run(workspace, "bad", override) == 2
    assert message in capsys.readouterr().err
    assert not (workspace / "bad" / "checkpoints").exists()


def test_a_run_folder_belongs_to_one_config(workspace, capsys):
    assert run(workspace, "owned") == 0
    assert run(workspace, "owned", "optimizer.learning_rate=1e-3") == 2
    assert "holds a run with another optimizer.learning_rate" in capsys.readouterr().err
    assert run(workspace, "owned", "train.accumulate=1", "log.every=5", "model.remat=full") == 0


def test_not_finite_steps_are_skipped_then_fatal(workspace, capsys):
    more = ("optimizer.learning_rate=1e30", "train.steps=9", "optimizer.clip_norm=null")
    assert run(workspace, "diverged", *more, "train.max_skipped=2") == 1
    assert "3 steps had a loss or gradient that is not finite" in capsys.readouterr().err


def test_out_of_memory_is_one_line(capsys):
    def too_large():
        jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros((1 << 50,)) + 1)())

    assert run_command(too_large) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: the device is out of memory (it wanted " in error


def test_out_of_memory_in_training_names_what_fills_the_device(workspace, capsys, monkeypatch):
    def too_large(state, frozen, batch):
        jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros((1 << 50,)) + 1)())

    monkeypatch.setattr(train, "compile_step", lambda *_: too_large)
    assert run(workspace, "oom") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    for part in ("8 rows of data.row_length = 256", "model.remat = none", "layers.mlp.down.kernel (3, 384, 128)", "train.accumulate"):
        assert part in error


def test_a_long_compilation_is_announced(caplog):
    with caplog.at_level("INFO"), announce_compilation(after=0.05):
        time.sleep(0.3)
    assert "still compiling" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"), announce_compilation(after=0.2) as compiling:
        compiling(1, None, {}, None)
        time.sleep(0.4)
    assert "still compiling" not in caplog.text


def test_a_missing_accelerator_is_said(workspace):
    code = "import sys; from dqjax.load import start_jax; from dqjax.commands import run_command\nrun_command(start_jax)"
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "no accelerator found: running on the CPU" in done.stderr


def test_the_mesh_and_micro_batches_do_not_change_the_curve(workspace):
    """Equal losses to float32 rounding on 1, 2, 4 and 8 devices and for every split of the batch."""
    curves = {}
    for name, devices, more in [
        ("one", 1, ()),
        ("two", 2, ("mesh.fsdp=2",)),
        ("four", 4, ("mesh.fsdp=2", "mesh.tensor=2", "train.accumulate=4")),
        ("eight", 8, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulate=2")),
    ]:
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = spawn(workspace, f"mesh-{name}", "train.steps=3", *more, XLA_FLAGS=flags)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        curves[name] = curve(workspace / f"mesh-{name}")
    for name in ("two", "four", "eight"):
        np.testing.assert_allclose(list(curves[name].values()), list(curves["one"].values()), rtol=2e-5)
