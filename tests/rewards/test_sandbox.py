"""Programs that try to harm or hang the caller. None of these tests is a simulation: each runs the attack."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from dqjax.rewards.code import CodeGrader
from dqjax.rewards.sandbox import LimitsConfig, call_function, confine, run_asserts, run_script

TIGHT = LimitsConfig(wall=2.0, cpu=1.0, memory=512 << 20)


def run(program, stdin="", limits=TIGHT):
    began = time.monotonic()
    outcome = run_script(textwrap.dedent(program), stdin, limits)
    assert time.monotonic() - began < 10 + limits.wall, "the caller was held up"
    return outcome


@pytest.fixture(autouse=True)
def nothing_left_behind():
    def children():
        return {p.name for p in pathlib.Path("/proc").glob("[0-9]*") if _parent(p) == os.getpid()}

    import tempfile

    folder = pathlib.Path(tempfile.gettempdir())
    before, threads = children(), threading.active_count()
    mine = set(folder.glob("dqjax-program-*"))
    yield
    assert children() <= before
    assert threading.active_count() <= threads
    assert not {
        p for p in set(folder.glob("dqjax-program-*")) - mine if p.stat().st_uid == os.getuid() and _is_stale(p)
    }


def _parent(process):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return -1


def _is_stale(path):
    """Another test process may run programs at this moment; theirs are gone a little later."""
    deadline = time.monotonic() + 15
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return path.exists()


def test_ordinary_programs_run():
    assert run("print(input()[::-1])", "abc").stdout == "cba\n"
    assert run("import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))", "1 2\n3").stdout == "6\n"
    assert run("print(gcd(4, 6), Counter('aab')['a'])").stdout == "2 2\n"  # LiveCodeBench's prelude
    assert run("if __name__ == '__main__':\n    print('main'); exit()").stdout == "main\n"
    assert run("def f(n): return 0 if n == 0 else 1 + f(n - 1)\nprint(f(20000))").stdout == "20000\n"
    big = "x" * (1 << 20)
    assert run("s = input(); print(len(s)); print(s)", big).stdout == f"{1 << 20}\n{big}\n"
    assert run("print('é', '漢')").stdout == "é 漢\n"


def test_threads_asyncio_and_numpy_work():
    deep = "import threading\nthreading.stack_size(64 << 20)\nt = threading.Thread(target=print, args=(1,))\nt.start(); t.join()"
    assert run(deep).stdout == "1\n"
    assert run("import asyncio\nasync def f(): print(2)\nasyncio.run(f())").stdout == "2\n"
    assert (
        run("import numpy as np\nprint(np.arange(4).reshape(2, 2) @ np.ones(2))", limits=LimitsConfig(wall=20)).stdout
        == "[1. 5.]\n"
    )


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("raise ValueError('no')", "exit code 1: ValueError: no"),
        ("exit(3)", "exit code 3"),
        ("import sys; sys.exit('bad')", "exit code 1"),
        ("def f(:", "SyntaxError"),
        ("import os; os._exit(4)", "exit code 4"),
        ("import os; os.abort()", "signal 6"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "signal 15"),
        ("import ctypes; ctypes.string_at(0)", "crashed"),
    ],
)
def test_ends_are_named(program, ended):
    outcome = run(program)
    assert ended in outcome.ended


def test_fork_bombs_do_not_start():
    for program in (
        "import os\nwhile True: os.fork()",
        "import subprocess\nwhile True: subprocess.Popen(['sleep', '9'])",
        "import multiprocessing as m\nm.Process(target=print).start()",
        "import os\nwhile True: os.system('sleep 9 &'); os.fork()",
        "import os\nos.execv('/bin/sh', ['sh', '-c', 'sleep 9'])",
        "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
    ):
        assert "PermissionError" in run(program).ended, program


def test_raw_system_calls_are_refused():
    """Through ctypes, past every Python check: fork, clone, clone3, x32 and 32-bit calls, io_uring, memfd, ptrace."""
    if confine.platform.machine() != "x86_64":
        pytest.skip("numbers of x86_64")
    outcome = run("""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        for call in [(57,), (58,), (56, 17, 0), (435, 0, 0), (425, 8, 0), (319, b"x", 0), (101, 0), (310, 1), (424, 1, 9), (321,)]:
            print(call[0], libc.syscall(*call), ctypes.get_errno())
    """)
    assert outcome.ended is None
    assert [line.split()[1:] for line in outcome.stdout.splitlines()] == [
        ["-1", "38" if n in (435, 425, 424) else "1"] for n in (57, 58, 56, 435, 425, 319, 101, 310, 424, 321)
    ]
    assert run("import ctypes\nctypes.CDLL(None).syscall(0x40000000 + 57)").ended == "signal 31"
    int80 = """
        import ctypes, mmap
        m = mmap.mmap(-1, 4096, prot=7)
        m.write(bytes.fromhex("b802000000cd80c3"))
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()
    """
    assert run(int80).ended == "signal 31"


def test_endless_output_is_cut():
    limits = LimitsConfig(wall=5.0, output=1 << 20)
    assert run("while True: print('x' * 4096)", limits=limits).ended == "output"
    assert len(run("while True: print('x' * 4096)", limits=limits).stdout) <= (1 << 20) + 1
    assert run("import sys\nwhile True: sys.stderr.write('x' * 4096)", limits=TIGHT).ended in ("wall clock", "CPU time")


def test_endless_computation_and_sleep_are_stopped():
    def run(program):
        return globals()["run"](program, limits=LimitsConfig(wall=1.0, cpu=1.0))

    assert run("while True: pass").ended in ("CPU time", "wall clock")
    assert run("import time; time.sleep(1000)").ended == "wall clock"
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)").ended == "wall clock"
    ignoring = "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ntime.sleep(100)"
    assert run(ignoring).ended == "wall clock"
    closing = "import os, time\nfor n in range(64):\n    try: os.close(n)\n    except OSError: pass\ntime.sleep(100)"
    assert run(closing).ended == "wall clock"
    assert run("print(9 ** 9 ** 9)").ended in ("CPU time", "wall clock", "exit code 1: MemoryError")


def test_memory_is_bounded():
    assert run("x = bytearray(10 << 30)").ended == "exit code 1: MemoryError"
    assert (
        "MemoryError"
        in run("x = []\nwhile True: x.append(bytes(16 << 20))", limits=LimitsConfig(wall=30, memory=256 << 20)).ended
    )
    assert run("import mmap\nm = mmap.mmap(-1, 10 << 30)").ended.startswith("exit code 1")
    raised = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    assert "exit code 1" in run(raised).ended
    assert (
        "PermissionError"
        in run("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))").ended
    )


def test_thread_bombs_are_stopped():
    assert run("import threading, time\nthreading.stack_size(32768)\nwhile True: threading.Thread(target=time.sleep, args=(9,)).start()").ended in (
        "threads", "exit code 1: RuntimeError: can't start new thread",
    )  # fmt: skip


def test_files_outside_cannot_be_read_or_changed(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    before = secret.stat()
    attempts = [
        "open(P).read()", "open(P, 'w')", "open(P, 'a')", "os.remove(P)", "os.rename(P, P + '2')", "os.chmod(P, 0o777)",
        "os.chown(P, 1, 1)", "os.utime(P, (0, 0))", "os.truncate(P, 0)", "os.open(P, os.O_RDONLY | os.O_TRUNC)", "os.link(P, 'x')",
        "os.symlink(P, 'x')", "os.mkdir(P + 'd')", "os.rmdir(os.path.dirname(P))", "open(P + '2', 'w')", "os.listdir(os.path.dirname(P))",
        "os.setxattr(P, 'user.x', b'1')", "open('/dev/shm/x', 'w')", "open('/tmp/x-of-a-program', 'w')", "os.mkfifo('x')",
        "open('/proc/self/environ').read()", "open(f'/proc/{os.getppid()}/environ').read()", "os.mknod('x', 0o60666, 0x801)",
        "os.listdir('/')", "open('/etc/passwd').read()", "os.chroot('.')", "open('/proc/self/mem', 'r+b')", "os.statvfs(P) and open(P, 'r+')",
    ]  # fmt: skip
    program = f"import os\nP = {str(secret)!r}\n" + "".join(
        f"try:\n    {attempt}\n    print({attempt!r})\nexcept OSError: pass\n" for attempt in attempts
    )
    outcome = run(program)
    assert (outcome.ended, outcome.stdout) == (None, "")
    after = secret.stat()
    assert secret.read_text() == "secret" and (after.st_mode, after.st_mtime, after.st_uid) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
    )
    assert list(tmp_path.iterdir()) == [secret]


def test_the_own_folder_is_writable_within_bounds():
    assert run("open('a', 'w').write('hi')\nprint(open('a').read())").stdout == "hi\n"
    assert (
        "File too large"
        in run("f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))", limits=LimitsConfig(file_size=1 << 20)).ended
    )
    assert run("for i in range(10 ** 6): open(str(i), 'w').close()").ended == "files"
    assert (
        run(
            "for i in range(60): open(str(i), 'wb').write(bytes(1 << 20))\nimport time; time.sleep(9)",
            limits=LimitsConfig(wall=5, file_size=1 << 20),
        ).ended
        == "files"
    )
    assert "Too many open files" in run("x = [open('a', 'w') for _ in range(1000)]").ended


def test_there_is_no_network():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    try:
        for program in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "import socket; socket.socket(socket.AF_UNIX)",
            "import socket; socket.socket(16, socket.SOCK_RAW, 0)",
        ):
            assert "PermissionError" in run(program).ended, program
        assert (
            "exit code 1" in run(f"import urllib.request as u; u.urlopen('http://127.0.0.1:{port}', timeout=1)").ended
        )
    finally:
        server.close()


def test_signals_to_others_are_refused():
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    try:
        for target in ("os.getppid()", "-1", "0", "1", "-os.getpgrp()"):
            assert "PermissionError" in run(f"import os; os.kill({target}, 15)").ended
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not got


def test_nothing_is_inherited():
    """Neither the environment nor open files of the caller reach a program."""
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    os.environ["DQJAX_TEST_SECRET"] = "secret"
    try:
        assert "SECRET" not in run("import os; print(dict(os.environ))").stdout
        outcome = run(
            "import os\nfor n in range(3, 64):\n    try: print(n, os.fstat(n).st_mode)\n    except OSError: pass"
        )
    finally:
        del os.environ["DQJAX_TEST_SECRET"]
        os.close(reader)
        os.close(writer)
    assert len(outcome.stdout.splitlines()) == 1  # the verdict pipe


def test_functions_are_called_and_their_results_compared_outside():
    program = "class Solution:\n    def add(self, a, b):\n        print('noise')\n        return (a + b, [a])"
    outcome = call_function(program, "add", [[1, 2], ["a", "b"]])
    assert outcome.verdicts == ({"result": [3, [1]]}, {"result": ["ab", ["a"]]})
    outcome = call_function("def f(x):\n    return 1 // x", "f", [[1], [0], [1]])
    assert outcome.verdicts == ({"result": 1},) and "ZeroDivisionError" in outcome.ended
    assert "KeyError" in call_function("x = 1", "f", [[1]]).ended
    assert call_function("def f(x): return object()", "f", [[1]]).verdicts == ()


def test_every_call_has_the_whole_wall_clock_but_not_for_ever():
    slow = "import time\ndef f(x):\n    time.sleep(0.7)\n    return x"
    assert len(call_function(slow, "f", [[1], [2], [3]], LimitsConfig(wall=1.5)).verdicts) == 3
    chatty = "import os, time\nwhile True:\n    time.sleep(0.05)\n    for n in range(3, 9):\n        try: os.write(n, b'{}\\n')\n        except OSError: pass"
    began = time.monotonic()
    assert call_function(chatty, "f", [[1], [2]], LimitsConfig(wall=0.8)).ended == "wall clock"
    assert time.monotonic() - began < 8


def test_asserts_pass_or_say_why():
    tests = "def check(f):\n    assert f(1) == 2, 'off by one'"
    assert run_asserts("def g(x): return x + 1", tests, "g") is True
    assert "off by one" in run_asserts("def g(x): return x", tests, "g")
    for escape in ("import os; os._exit(0)", "exit()", "raise SystemExit", "import sys; sys.exit(0)"):
        assert run_asserts(f"{escape}\ndef g(x): return 0", tests, "g") is not True
        assert run_asserts(f"def g(x):\n    {escape}", tests, "g") is not True
    forged = 'import os\nfor n in range(3, 9):\n    try: os.write(n, b\'{"passed": ""}\\n{"passed": true}\\n\')\n    except OSError: pass\nos._exit(0)'
    assert run_asserts(forged, tests, "g") is not True
    assert run_asserts("def g(x): return x + 1", "assert g(1) == 2") is True


def test_hostile_verdicts_do_not_break_the_caller():
    for line in ("[" * 100000, "1" * 100000, "{", "\\xff", "null", "{'a': 1}"):
        program = f"import os\nfor n in range(3, 9):\n    try: os.write(n, b'{line}\\n')\n    except OSError: pass"
        call_function(program, "f", [[1]], TIGHT)


def test_a_machine_that_cannot_confine_runs_nothing(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    package = pathlib.Path(confine.__file__).parent
    child.write_text((package / "child.py").read_text().replace("os.path.dirname(__file__)", repr(str(tmp_path))))
    broken = (
        (package / "confine.py")
        .read_text()
        .replace(
            "def confine(*, readable",
            "def confine(*, readable=0, writable=0):\n    raise Unconfined('no Landlock')\ndef _(*, readable",
        )
    )
    (tmp_path / "confine.py").write_text(broken)
    monkeypatch.setattr("dqjax.rewards.sandbox._CHILD", child)
    with pytest.raises(NotImplementedError, match="no Landlock"):
        run_script("open('ran', 'w')", "", TIGHT)
    with pytest.raises(NotImplementedError, match="no Landlock"):
        CodeGrader()


def test_a_killed_caller_takes_its_program_with_it(tmp_path):
    """Its temporary folder stays: who is killed cannot tidy up."""
    code = (
        "import threading, time\nfrom dqjax.rewards.sandbox import LimitsConfig, run_script\n"
        "run_script('import time, sys\\nprint(1, flush=True)\\ntime.sleep(60)', '', LimitsConfig(wall=60.0))\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    try:
        deadline = time.monotonic() + 30
        program = None
        while program is None and time.monotonic() < deadline:
            program = next((p for p in pathlib.Path("/proc").glob("[0-9]*") if _parent(p) == caller.pid), None)
            time.sleep(0.05)
        time.sleep(1.0)
    finally:
        caller.kill()
        caller.wait()
    deadline = time.monotonic() + 15
    while program.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not program.exists()


def test_programs_run_side_by_side():
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outcomes = pool.map(lambda i: run_script(f"print({i})", ""), range(12))
        assert [o.stdout for o in outcomes] == [f"{i}\n" for i in range(12)]
