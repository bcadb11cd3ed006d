"""Two processes, or four, on one host (gloo): the multi-host paths of data, training, saving and resuming."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from dqjax.checkpoint import Checkpoints
from tests.test_train import curve
from tests.workspace import DEBUG, ROOT, make_workspace, overrides


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def start(workspace: pathlib.Path, name: str, processes: int, *more: str, config: str = "sft") -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    # four devices in all, so that every run has the same mesh
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes}"}
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    more = ("train.steps=6", "checkpoint.every=2", "mesh.fsdp=2", "mesh.tensor=1", "mesh.data=2", *more)
    values = overrides(workspace, name, *more, config=config)
    command = [sys.executable, "-m", "dqjax.train", "--config", str(DEBUG / f"{config}.yaml"), *values]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(processes)
    ]


def finish(processes: list[subprocess.Popen]) -> list[int]:
    try:
        outputs = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [p.returncode for p in processes]
    assert all(c in (0, 128 + signal.SIGTERM) for c in codes), "\n\n".join(outputs)
    return codes


def test_two_processes_train_save_and_resume_as_one(workspace):
    assert finish(start(workspace, "one", 1)) == [0]
    assert finish(start(workspace, "two", 2)) == [0, 0]
    expected = curve(workspace / "one")
    np.testing.assert_allclose(list(curve(workspace / "two").values()), list(expected.values()), rtol=2e-5)
    folder = workspace / "two" / "checkpoints" / "step_00000006"
    assert sorted(p.name for p in folder.glob("manifest-*")) == ["manifest-0-of-2.json", "manifest-1-of-2.json"]

    # A run of two processes goes on as one, and as two again: no row is lost or repeated.
    first = start(workspace, "moved", 2, "train.eval_every=6")
    metrics = workspace / "moved" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and first[0].poll() is None:
        time.sleep(0.01)
    for process in first:
        process.send_signal(signal.SIGKILL)
    for process in first:
        process.communicate()
    assert Checkpoints(workspace / "moved" / "checkpoints").steps(), "killed before the first checkpoint"
    assert finish(start(workspace, "moved", 1, "train.eval_every=6")) == [0]
    np.testing.assert_allclose(list(curve(workspace / "moved").values()), list(expected.values()), rtol=2e-5)


@pytest.mark.parametrize("many", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_sample_and_reward_as_one(workspace, many):
    """The same samples, rewards and updates; each process grades its share and feeds its rows."""
    more = ("train.steps=4", "objective.passes=2", "objective.table=4", "train.eval_every=4", "checkpoint.every=4")
    names = f"policy-one-for-{many}", f"policy-{many}"
    for name, processes in zip(names, (1, many)):
        assert finish(start(workspace, name, processes, *more, config="grpo")) == [0] * processes
    one, two = ((workspace / name / "rollouts.jsonl").read_text() for name in names)
    texts = [[json.loads(line)["text"] for line in rows.splitlines()] for rows in (one, two)]
    assert texts[0] == texts[1] and len(texts[0]) == 2 * 4 * 4
    logged = [
        [json.loads(line) for line in (workspace / name / "metrics.jsonl").read_text().splitlines()]
        for name in names
    ]
    for a, b in zip(*logged, strict=True):
        shared = {"loss", "gradient_norm", "reward", "reward/overlong", "eval/reward", "eval/accuracy"} & a.keys()
        assert shared
        for name in shared:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name


SLOW = [pytest.param(objective, marks=pytest.mark.slow) for objective in ("scorer", "preference")]


@pytest.mark.parametrize("objective", ["reward", "distill", *SLOW])
def test_two_processes_train_other_objectives_as_one(workspace, objective):
    """Pairs, labels and teachers are split over hosts without a change of any number, tokens counted included."""
    more = ("train.steps=3", "train.eval_every=3", "checkpoint.every=3", "data.validation=0.1", "train.batch_rows=8")
    logged = []
    for name, processes in ((f"{objective}-one", 1), (f"{objective}-two", 2)):
        assert finish(start(workspace, name, processes, *more, config=objective)) == [0] * processes
        logged.append([json.loads(line) for line in (workspace / name / "metrics.jsonl").read_text().splitlines()])
    for a, b in zip(*logged, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_second", "seconds_per_step", "device_hours"}:
            if not isinstance(a[name], str):
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name


def test_sigterm_stops_all_processes_at_one_step(workspace):
    more = ("train.steps=3000", "checkpoint.every=3000", "train.eval_every=3000")
    both = start(workspace, "term", 2, *more)
    metrics = workspace / "term" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and both[0].poll() is None:
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)  # one host is preempted; both must stop, after the same step
    assert finish(both) == [128 + signal.SIGTERM] * 2
    checkpoints = Checkpoints(workspace / "term" / "checkpoints")
    (step,) = checkpoints.steps()
    assert checkpoints.intact_step() == step
