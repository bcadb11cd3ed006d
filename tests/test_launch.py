"""The launch scripts, as far as they go without the machines they launch."""

import os
import subprocess

import pytest

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
