"""python -m dqjax.teacher_logits on one process and on two, killed in the middle of a shard and started again."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from dqjax.config import ConfigError
from dqjax.data.sample_cache import SampleCache
from tests.workspace import DEBUG, ROOT, make_workspace, overrides

# Writes shards of 600 trained tokens; numpy's save kills the process named by KILL when it is called for the n-th time.
WRITE = """
import os, pathlib, signal, sys
import numpy as np
from dqjax import teacher_logits
from dqjax.commands import run_command
from dqjax.config import load
from dqjax.load import start_jax
from dqjax.train_config import Config

config, teacher, folder, *values = sys.argv[1:]
process, left = map(int, os.environ["KILL"].split(","))
save = np.save

def save_or_die(path, array):
    global left
    left -= 1
    if left == 0 and process == int(os.environ.get("JAX_PROCESS_ID", 0)):
        pathlib.Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, array)

np.save = save_or_die

def main():
    start_jax()
    teacher_logits.write_cache(load(Config, config, values), teacher, pathlib.Path(folder), k=8, shard_rows=600)
    return 0

sys.exit(run_command(main))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def write(workspace, name, processes=1, *more, kill=(0, 0)):
    """Writes the cache `name` by so many processes; returns their exit codes and what they printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}",  # two devices in all, one mesh
        "KILL": f"{kill[0]},{kill[1]}",
        "PYTHONPATH": str(ROOT),
    }
    if processes > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    student = workspace / "runs/chain_sum/student"
    more = ("mesh.fsdp=2", "mesh.data=1", "train.batch_rows=4", "data.validation=0.1", *more)
    values = overrides(workspace, "unused", *more, config="distill")
    command = [sys.executable, "-c", WRITE, str(DEBUG / "distill.yaml"), str(student), str(workspace / name), *values]
    running = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=env | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    try:
        if kill[1]:
            running[kill[0]].wait(300)  # the others wait for it, in vain
        else:
            for process in running:
                process.wait(300)
    finally:
        for process in running:
            process.kill()
        printed = [process.communicate()[0] for process in running]
    return [process.returncode for process in running], "\n".join(printed)


@pytest.fixture(scope="module")
def whole(workspace):
    """Caches that were not interrupted, by the number of processes that wrote them."""
    for processes in (1, 2):
        codes, printed = write(workspace, f"{processes}-whole", processes)
        assert codes == [0] * processes, printed
    return {processes: workspace / f"{processes}-whole" for processes in (1, 2)}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_it_leaves_the_same_files(workspace, whole, processes):
    name = f"{processes}-killed"
    # the fourth array of the third shard; where there are two processes, the second's
    codes, printed = write(workspace, name, processes, kill=(processes - 1, 2 * 5 + 4))
    assert codes[-1] == -signal.SIGKILL, printed
    with pytest.raises(ConfigError, match="its writing was not finished; start the same command again"):
        SampleCache(workspace / name)
    codes, printed = write(workspace, name, processes, "data.seed=7")
    assert 2 in codes and "holds an unfinished cache of another command (meta: made_by" in printed, printed
    first = workspace / name / f"shard-00{processes - 1}-00000.logprobs.npy"
    written = first.stat().st_mtime_ns
    codes, printed = write(workspace, name, processes)
    assert codes == [0] * processes and "going on behind batch" in printed, printed
    assert first.stat().st_mtime_ns == written  # kept, not computed again
    assert files(workspace / name) == files(whole[processes])


def rows(folder):
    """Each sample's top-k ids and log-probabilities, by its key, as the files hold them."""
    found = {}
    for path in sorted(folder.glob("*.keys.npy")):
        keys, starts, ids, logprobs = (
            np.load(path.with_name(path.name.replace("keys", name))) for name in ("keys", "starts", "ids", "logprobs")
        )
        for i, key in enumerate(keys.tolist()):
            part = slice(starts[i], starts[i + 1])
            found[key] = ids[part], logprobs.view("bfloat16")[part].astype(np.float32)
    return found


def test_two_processes_write_what_one_does(whole):
    one, two = (rows(folder) for folder in whole.values())
    assert one.keys() == two.keys() and len(one) > 200
    for key, (ids, logprobs) in one.items():
        np.testing.assert_array_equal(two[key][0], ids)
        np.testing.assert_allclose(two[key][1], logprobs, atol=0.02)
