"""A pool of processes that answer JSON requests, each within a time limit.

Graders that call other people's code on text that a model wrote (sympy on `10^{10^{10}}`, a puzzle's scorer) need to be
stopped from outside: such code may run for hours, take all memory, or die. So each worker is a process of its own, spoken
to over pipes, one line of JSON a request. A request that runs over its time costs the worker its life and nothing else.

A worker gives up its rights to files, network and processes (`sandbox.confine`) where the kernel lets it.

Neither fork nor multiprocessing is used: a trainer holds accelerator threads, which fork breaks, and `spawn` would import
the trainer's main module in every worker.
"""

import contextlib
import importlib
import json
import os
import pathlib
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dqjax.rewards.sandbox import confine

ROOT = pathlib.Path(__file__).parents[2]
START_SECONDS = 120.0  # for imports on a busy machine; the time limit of a request starts after them


class Reply(NamedTuple):
    """What came back for one request: a value, or the reason why there is none ("timeout", "RecursionError: ...")."""

    value: Any = None
    failed: str | None = None


class Workers:
    """Calls a function `request → value` (both JSON) in other processes.

    Args:
      function: "package.module:name", imported by each worker.
      workers: processes; started when first needed, kept until `close`.
      timeout: seconds a request.
      memory: bytes of address space a worker.

    Safe to call from one thread at a time. An orphaned worker ends by itself: when its input closes, or at the latest two
    seconds after the time limit of the request it works on.
    """

    def __init__(self, function: str, *, workers: int = 2, timeout: float = 5.0, memory: int = 4 << 30):
        if workers < 1 or timeout <= 0:
            raise ValueError(f"expected workers >= 1 and timeout > 0, got {workers} and {timeout}")
        self._function, self._timeout, self._memory = function, timeout, memory
        self._slots: list[_Worker | None] = [None] * workers
        self._finalizer = weakref.finalize(self, _end_all, self._slots)

    def map(self, requests: Sequence[Any]) -> list[Reply]:
        """One reply a request, in order."""
        replies: list[Reply] = [Reply(failed="not run")] * len(requests)
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i in range(len(requests)):
            todo.put(i)

        def drain(slot: int) -> None:
            while True:
                try:
                    i = todo.get_nowait()
                except queue.Empty:
                    return
                replies[i] = self._ask(slot, requests[i])

        threads = [threading.Thread(target=drain, args=(k,)) for k in range(min(len(self._slots), len(requests)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return replies

    def close(self) -> None:
        """Ends the workers; a later `map` starts new ones."""
        _end_all(self._slots)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _ask(self, slot: int, request: Any) -> Reply:
        line = json.dumps(request, default=str).encode() + b"\n"
        for attempt in (1, 2):
            worker = self._slots[slot]
            try:
                if worker is None:
                    worker = self._slots[slot] = _Worker(self._function, self._timeout, self._memory)
                answer = worker.ask(line, self._timeout)
            except (OSError, TimeoutError, EOFError) as e:
                if worker is not None:
                    worker.end()
                self._slots[slot] = None
                if isinstance(e, TimeoutError):
                    return Reply(failed="timeout")
                if attempt == 2 or worker is None or worker.asked:
                    return Reply(failed=f"the worker died: {e}")
                continue
            return Reply(**json.loads(answer))
        raise AssertionError("unreachable")


class _Worker:
    def __init__(self, function: str, timeout: float, memory: int):
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, function, str(timeout), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self._buffer = b""
        self.asked = False
        try:
            self._read_line(START_SECONDS)
        except BaseException:
            self.end()
            raise

    def ask(self, line: bytes, timeout: float) -> bytes:
        self.asked = False
        self._process.stdin.write(line)
        self._process.stdin.flush()
        self.asked = True
        return self._read_line(timeout)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        with contextlib.suppress(OSError):  # what it never read is of no use now
            self._process.stdin.close()

    def _read_line(self, timeout: float) -> bytes:
        deadline, out = time.monotonic() + timeout, self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            block = os.read(out, 1 << 16)
            if not block:
                raise EOFError(f"exit code {self._process.wait()}")
            self._buffer += block
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _end_all(slots: list[_Worker | None]) -> None:
    for i, worker in enumerate(slots):
        slots[i] = None
        if worker is not None:
            worker.end()


def _serve(function: Callable[[Any], Any], timeout: float, replies: Any) -> None:
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, timeout + 2)  # kills this process where nobody is left to do it
        try:
            reply = {"value": function(json.loads(line))}
        except Exception as e:
            reply = {"failed": f"{type(e).__name__}: {e}"[:300]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


def _main(function: str, timeout: str, memory: str) -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print into the replies
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    module, _, name = function.partition(":")
    target = getattr(importlib.import_module(module), name)
    # Such code evaluates text that a model wrote (sympy's parser does): it needs no network, no files, no processes.
    try:
        confine.confine(readable=[*confine.installation(), str(ROOT / "dqjax")], writable=[])
    except confine.Unconfined as e:
        print(f"grading without confinement: {e}", file=sys.stderr)
    replies.write(b"ready\n")
    replies.flush()
    _serve(target, float(timeout), replies)


if __name__ == "__main__":
    _main(*sys.argv[1:])
