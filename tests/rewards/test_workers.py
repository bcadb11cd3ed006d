"""Requests that run too long, die or misbehave in their own process."""

import os
import pathlib
import subprocess
import sys
import textwrap
import time

import pytest

from dqjax.rewards.workers import Reply, Workers

FUNCTIONS = """
import os, sys, time

def act(request):
    match request["do"]:
        case "echo": return request["value"]
        case "pid": return os.getpid()
        case "sleep": time.sleep(request["seconds"])
        case "spin":
            while True: pass
        case "raise": raise RuntimeError("no luck " + "x" * 10000)
        case "recurse": return act(request)
        case "die": os._exit(3)
        case "print": print("hello\\n{}"); return 1
        case "memory": return len(bytearray(request["bytes"]))
        case "open": return open(request["path"]).read(10)
        case "socket":
            import socket
            socket.socket()
        case "odd": return float("nan")
"""


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("functions")
    (folder / "worker_functions.py").write_text(textwrap.dedent(FUNCTIONS))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    with Workers("worker_functions:act", workers=2, timeout=1.0, memory=1 << 30) as workers:
        yield workers
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def test_replies_come_in_order(workers):
    assert workers.map([{"do": "echo", "value": i} for i in range(50)]) == [Reply(i) for i in range(50)]
    assert workers.map([]) == []


def test_a_request_over_its_time_is_stopped_and_the_rest_goes_on(workers):
    requests = [{"do": "spin"}, {"do": "echo", "value": 1}, {"do": "sleep", "seconds": 60}, {"do": "echo", "value": 2}]
    began = time.monotonic()
    assert workers.map(requests) == [Reply(failed="timeout"), Reply(1), Reply(failed="timeout"), Reply(2)]
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("request_", "failed"),
    [
        ({"do": "raise"}, "RuntimeError: no luck"),
        ({"do": "recurse"}, "RecursionError"),
        ({"do": "die"}, "exit code 3"),
        ({"do": "memory", "bytes": 10 << 30}, "MemoryError"),
        ({"do": "open", "path": "/etc/passwd"}, "PermissionError"),
        ({"do": "socket"}, "PermissionError"),
    ],
)
def test_failures_are_replies(workers, request_, failed):
    bad, good = workers.map([request_, {"do": "echo", "value": 1}])
    assert failed in bad.failed and len(bad.failed) < 500 and good == Reply(1)


def test_printing_does_not_disturb(workers):
    assert workers.map([{"do": "print"}, {"do": "echo", "value": 5}]) == [Reply(1), Reply(5)]


def test_processes_are_kept_between_calls_and_ended_at_close(workers):
    pids = {reply.value for reply in workers.map([{"do": "pid"}] * 20)}
    again = {reply.value for reply in workers.map([{"do": "pid"}] * 20)}
    assert again & pids and len(pids | again) <= 2
    workers.close()
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids | again)
    assert workers.map([{"do": "echo", "value": 3}]) == [Reply(3)]


def test_a_worker_that_died_between_calls_is_replaced(workers):
    import signal

    for reply in workers.map([{"do": "pid"}] * 20):
        try:
            os.kill(reply.value, signal.SIGKILL)
        except ProcessLookupError:
            pass
    time.sleep(0.2)
    assert workers.map([{"do": "echo", "value": i} for i in range(4)]) == [Reply(i) for i in range(4)]


def test_an_orphan_ends_by_itself(tmp_path):
    """A killed caller leaves no worker behind, even one in the middle of an endless computation."""
    (tmp_path / "orphan_functions.py").write_text(
        "import os\ndef act(request):\n    open(os.devnull)\n    while True: pass\n"
    )
    code = (
        "import threading, time\nfrom dqjax.rewards.workers import Workers\n"
        "w = Workers('orphan_functions:act', workers=1, timeout=1.0)\n"
        "threading.Thread(target=w.map, args=([1],), daemon=True).start()\n"
        "while w._slots[0] is None: time.sleep(0.01)\n"
        "print(w._slots[0]._process.pid, flush=True)\ntime.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True)
    worker = pathlib.Path("/proc") / caller.stdout.readline().strip()
    caller.kill()
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 20
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(process: pathlib.Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_bad_arguments():
    with pytest.raises(ValueError, match="workers >= 1"):
        Workers("a:b", workers=0)


def test_a_function_that_cannot_be_imported_fails_every_request():
    with Workers("no_such_module:f", workers=1) as workers:
        assert "died" in workers.map([1])[0].failed
