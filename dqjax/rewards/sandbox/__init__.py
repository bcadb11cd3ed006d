"""Runs programs that a model wrote, so that they cannot harm or hang the caller.

A program runs in a process of its own with

- CPU time, address space, file size and open files under resource limits; wall clock, output, threads, and the number and
  total size of files watched from outside, every 20 ms (between two looks these can be passed, until the process is
  killed);
- no other process: fork, exec and signals to others are refused, so ending one process ends all of it;
- no network: sockets are refused;
- files: a temporary folder, flat, removed afterwards; the Python installation and the system's libraries to read. All else
  can be neither opened nor changed (that a path exists can be seen);
- an environment that holds nothing of the caller's.

The same for root and for other users, without privileges: `confine` says by which means. A machine that lacks them gets
`NotImplementedError`, never an unconfined run.

A caller that is killed takes its programs with it; their temporary folders stay.

Not guaranteed: a kernel without flaws; and with tests that run inside the program's process (form `assert`), that a program
which looks for its own verdict cannot forge it. The forms `stdin` and `call` are compared outside, where it cannot.
"""

import dataclasses
import json
import os
import pathlib
import secrets
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pydantic

from dqjax.config import Section
from dqjax.rewards.sandbox import confine

_CHILD = pathlib.Path(__file__).parent / "child.py"
_LOOK = 0.02  # seconds between two looks at threads and files
_STDERR_KEPT = 4096


class LimitsConfig(Section):
    """What a program may use, for each test.

    wall, cpu: seconds. memory: bytes of address space. output: bytes printed. file_size: bytes a file; four times that in
    all. files: in its folder. open_files, threads: at a time.
    """

    wall: float = pydantic.Field(10.0, gt=0)
    cpu: float = pydantic.Field(6.0, gt=0)
    memory: int = pydantic.Field(1 << 30, ge=64 << 20)
    output: int = pydantic.Field(16 << 20, ge=1)
    file_size: int = pydantic.Field(16 << 20, ge=1)
    files: int = pydantic.Field(64, ge=1)
    open_files: int = pydantic.Field(64, ge=16)
    threads: int = pydantic.Field(64, ge=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
      ended: None for an ordinary end with exit code 0; else why not ("wall clock", "exit code 1: ValueError: ...").
      stdout: what it printed, up to the limit.
      verdicts: the lines that the child reported, decoded.
      seconds: wall time.
    """

    ended: str | None
    stdout: str
    verdicts: tuple[dict[str, Any], ...]
    seconds: float


def run_script(program: str, stdin: str, limits: LimitsConfig = LimitsConfig()) -> Outcome:
    """Runs a program as a script on an input."""
    return _run({"form": "stdin", "program": program}, stdin, limits)


def call_function(
    program: str, function: str, arguments: Sequence[Sequence[Any]], limits: LimitsConfig = LimitsConfig()
) -> Outcome:
    """Calls a function of a program (or a method of its class Solution) with each list of JSON arguments.

    `verdicts` holds {"result": value} for each call that returned a JSON value, in order. Wall clock is a limit of each
    call, CPU time of all together, times their number.
    """
    job = {"form": "call", "program": program, "function": function, "arguments": [list(a) for a in arguments]}
    return _run(job, "", limits, calls=len(arguments))


def run_asserts(
    program: str, code: str, function: str | None = None, limits: LimitsConfig = LimitsConfig()
) -> bool | str:
    """Runs a program and then tests that raise where it is wrong; with `function`, calls `check(function)` of the tests.

    Returns:
      True, or why not.
    """
    nonce = secrets.token_hex(16)
    outcome = _run(
        {"form": "assert", "program": program, "code": code, "function": function, "nonce": nonce}, "", limits
    )
    if {"passed": nonce} in outcome.verdicts:
        return True
    return outcome.ended or "the program ended before its tests"


def ensure_confinement() -> None:
    """Runs an empty program; raises `NotImplementedError` where programs cannot be confined."""
    run_script("", "")


def _run(job: dict[str, Any], stdin: str, limits: LimitsConfig, calls: int = 1) -> Outcome:
    kept = limits.model_dump(include={"memory", "file_size", "open_files"})
    job |= {
        "limits": kept | {"cpu": max(1, round(limits.cpu * calls))},
        "readable": confine.installation(),
        "packages": confine.packages(),
        "parent": os.getpid(),
    }
    with tempfile.TemporaryDirectory(prefix="dqjax-program-") as folder:
        with _file(json.dumps(job)) as job_file, _file(stdin) as input_file:
            reader, writer = os.pipe()
            try:
                process = subprocess.Popen(
                    [sys.executable, "-s", "-P", "-S", str(_CHILD), str(job_file.fileno()), str(writer)],
                    stdin=input_file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=folder,
                    env=_ENVIRONMENT,
                    pass_fds=(job_file.fileno(), writer),
                    start_new_session=True,
                )
            except BaseException:
                os.close(reader)
                raise
            finally:
                os.close(writer)
        try:
            watch = _Watch(process, reader, pathlib.Path(folder), limits, calls)
            ended = watch.until_end()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
            os.close(reader)
    return watch.outcome(ended)


# All that a program sees of an environment: text is UTF-8, hashes are the same in every run, numpy stays on one thread.
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
}


class _Watch:
    """Reads what a process says and ends it when it goes too far."""

    def __init__(self, process: subprocess.Popen, verdict: int, folder: pathlib.Path, limits: LimitsConfig, calls: int):
        self._process, self._folder, self._limits = process, folder, limits
        self._began = time.monotonic()
        self._deadline = self._began + limits.wall
        self._last = self._began + limits.wall * calls
        self._stdout, self._stderr, self._verdict = bytearray(), bytearray(), bytearray()
        self._streams: dict[int, Callable[[bytes], str | None]] = {
            process.stdout.fileno(): self._printed,
            process.stderr.fileno(): self._complained,
            verdict: self._reported,
        }

    def until_end(self) -> str | None:
        """Why the process had to be ended; None where it ended by itself."""
        look = 0.0
        with selectors.DefaultSelector() as selector:
            for fd in self._streams:
                selector.register(fd, selectors.EVENT_READ)
            while selector.get_map():
                now = time.monotonic()
                if now >= self._deadline:
                    return "wall clock"
                if now >= look:
                    look = now + _LOOK
                    if reason := self._too_much():
                        return reason
                for key, _ in selector.select(min(_LOOK, self._deadline - now)):
                    block = os.read(key.fd, 1 << 16)
                    if not block:
                        selector.unregister(key.fd)
                    elif reason := self._streams[key.fd](block):
                        return reason
                if self._process.poll() is not None and not selector.select(0):
                    break
        while self._process.poll() is None:  # it closed its streams and goes on
            if time.monotonic() >= self._deadline:
                return "wall clock"
            if reason := self._too_much():
                return reason
            time.sleep(_LOOK)
        return None

    def outcome(self, ended: str | None) -> Outcome:
        verdicts = [json.loads(line) for line in bytes(self._verdict).split(b"\n")[:-1] if _is_object(line)]
        if not verdicts or "confined" not in verdicts[0]:
            reason = verdicts[0].get("unconfined") if verdicts else None
            if reason is not None:
                raise NotImplementedError(f"programs cannot be confined on this machine, so none is run: {reason}")
            if ended is None:
                ended = "it did not start"
        code = self._process.returncode
        errors = self._stderr.decode("utf-8", "replace").strip()
        if ended is None and code:
            last = errors.rpartition("\n")[2][:200]
            ended = (
                _SIGNALS.get(-code, f"signal {-code}")
                if code < 0
                else f"exit code {code}" + (f": {last}" if last else "")
            )
        text = self._stdout.decode("utf-8", "replace")
        return Outcome(ended, text, tuple(verdicts[1:]), time.monotonic() - self._began)

    def _printed(self, block: bytes) -> str | None:
        self._stdout += block[: self._limits.output - len(self._stdout) + 1]
        return "output" if len(self._stdout) > self._limits.output else None

    def _complained(self, block: bytes) -> str | None:
        self._stderr += block
        del self._stderr[:-_STDERR_KEPT]
        return None

    def _reported(self, block: bytes) -> str | None:
        self._verdict += block
        self._deadline = min(time.monotonic() + self._limits.wall, self._last)  # each result has the whole limit
        return "output" if len(self._verdict) > self._limits.output else None

    def _too_much(self) -> str | None:
        try:
            status = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return None
        threads = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:")), 1)
        if threads > self._limits.threads:
            return "threads"
        number = total = 0
        for size in _sizes(self._folder):
            number, total = number + 1, total + size
            if number > self._limits.files or total > 4 * self._limits.file_size:
                return "files"
        return None


_SIGNALS = {9: "killed", 11: "crashed (out of stack or memory)", 24: "CPU time", 25: "file size"}


def _sizes(folder: pathlib.Path) -> Iterator[int]:
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                yield entry.stat(follow_symlinks=False).st_size
            except FileNotFoundError:
                continue


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _file(text: str):
    """An unnamed file that holds a text, at its beginning."""
    stream = tempfile.TemporaryFile()  # noqa: SIM115
    stream.write(text.encode("utf-8", "surrogatepass"))
    stream.seek(0)
    return stream
