"""The launch scripts, as far as they go without the machines they launch."""

import os
import subprocess

import pytest
import yaml

from tests.workspace import ROOT

TPU = str(ROOT / "launch" / "tpu" / "run.sh")


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


@pytest.mark.parametrize("script", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").rglob("*.sh")))
def test_scripts_parse(script):
    assert run("bash", "-n", script).returncode == 0


def test_tpu_dry_run_prints_what_it_would_run():
    command = ["python", "-m", "dqjax.train", "--config", "a b.yaml"]
    done = run("bash", TPU, "--name", "pod", "--zone", "z", "--repo", "r", "--ref", "c0ffee", "--dry-run", "--", *command)
    assert done.returncode == 0, done.stderr
    setup, work = done.stdout.splitlines()
    assert all(part in setup for part in ("--worker=all", "git checkout --quiet c0ffee", ".[tpu]"))
    assert "dqjax.train" in work and "a\\\\\\ b.yaml" in work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zone", "z", "--repo", "r", "--ref", "c", "--", "true"], "--name is missing"),
        (["--name", "n", "--zone", "z", "--repo", "r", "--ref", "c"], "no command"),
        (["--nam", "n"], "unknown option --nam"),
    ],
)
def test_tpu_bad_arguments(arguments, message):
    done = run("bash", TPU, *arguments)
    assert done.returncode == 2 and message in done.stderr


def test_tpu_restarts_until_it_succeeds_but_not_a_bad_config(tmp_path):
    """With a stand-in for gcloud: two preemptions, then success; and exit code 2 at once for a refused config."""
    calls = tmp_path / "calls"
    for name, body in [
        ("gcloud", f'echo x >>{calls}; n=$(wc -l <{calls}); case "$*" in *git*) exit 0;; *) [ $n -ge 6 ] || exit $CODE;; esac'),
        ("sleep", "exit 0"),
    ]:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    arguments = ["bash", TPU, "--name", "n", "--zone", "z", "--repo", "r", "--ref", "c", "--", "train"]
    assert run(*arguments, PATH=path, CODE="255").returncode == 0
    assert calls.read_text().count("x") == 6  # set-up and command, three times
    calls.unlink()
    done = run(*arguments, PATH=path, CODE="2")
    assert done.returncode == 2 and "not restarted" in done.stderr
    assert calls.read_text().count("x") == 2


def test_an_old_python_is_refused():
    done = run("bash", "-c", "source launch/env.sh && ensure_env test", PYTHON="/nonexistent/python")
    assert done.returncode == 1 and "set PYTHON" in done.stderr


def stand_in(folder, name, body):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_slurm_arrays_and_kubernetes_jobs_name_their_shard(tmp_path):
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin", "python", 'echo "$@"')
    here = {"DQJAX_ENV": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}
    done = run("bash", "launch/slurm/stage.sh", "verify", "--config", "a.yaml", **here, **array)
    assert done.stdout.split() == ["-m", "dqjax.data", "verify", "--config", "a.yaml", "--shard", "4/8"]
    assert run("bash", "launch/slurm/stage.sh", "verify", **here).returncode == 2

    job = yaml.safe_load((ROOT / "launch" / "gke" / "stage.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    done = run(*container["command"], *container["args"], JOB_COMPLETION_INDEX="15", **here)
    assert done.stdout.split()[-2:] == ["--shard", f"{job['completions'] - 1}/{job['parallelism']}"]


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (143, True)])
def test_slurm_training_goes_back_into_the_queue_only_when_stopped(tmp_path, code, requeued):
    stand_in(tmp_path, "srun", f"exit {code}")
    stand_in(tmp_path, "scontrol", f'echo "$@" >{tmp_path}/said')
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("bash", "launch/slurm/train.sh", "train", PATH=path, SLURM_JOB_ID="7")
    assert done.returncode == code
    assert (tmp_path / "said").exists() == requeued
