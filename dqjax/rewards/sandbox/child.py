"""The sandboxed process: takes its own rights away, then runs a program in one of three forms.

    python -s -P -S child.py JOB VERDICT         both are numbers of inherited file descriptors

JOB holds the job as JSON. VERDICT gets one line of JSON when the process is confined (or cannot be), and then one a result.
Standard input and output belong to the program.
"""

import builtins
import contextlib
import io
import json
import os
import sys
import traceback

sys.path.insert(0, os.path.dirname(__file__))
import confine  # noqa: E402

sys.path.pop(0)

# LiveCodeBench runs every program behind these (lcb_runner/evaluation/testing_util.py).
PRELUDE = """
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics, itertools, functools, operator, io, sys, json
sys.setrecursionlimit(50000)
"""


def main(job_fd: int, verdict_fd: int) -> None:
    with os.fdopen(job_fd, "rb") as stream:
        job = json.load(stream)
    confine.die_with_parent(job["parent"])
    verdict = os.fdopen(verdict_fd, "wb", buffering=0)

    def tell(**fields) -> None:
        verdict.write(json.dumps(fields).encode() + b"\n")

    try:
        confine.limit(**job["limits"])
        confine.confine(readable=job["readable"], writable=[os.getcwd()])
    except OSError as e:
        tell(unconfined=str(e))
        os._exit(1)
    tell(confined=True)
    sys.path.extend(job["packages"])
    builtins.exit = builtins.quit = sys.exit
    sys.argv = ["program.py"]
    FORMS[job["form"]](job, tell)


def run_stdin(job: dict, tell) -> None:
    """As a script: what it prints is compared by the parent, which alone knows what is right."""
    names = {"__name__": "__main__", "__builtins__": builtins}
    exec(PRELUDE, names)  # noqa: S102
    exec(compile(job["program"], "program.py", "exec"), names)  # noqa: S102


def run_calls(job: dict, tell) -> None:
    """Calls a function, or a method of Solution, on the arguments of each test; the parent compares the results."""
    names = {"__name__": "program", "__builtins__": builtins}
    exec(PRELUDE, names)  # noqa: S102
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(job["program"], "program.py", "exec"), names)  # noqa: S102
    owner, name = names.get("Solution"), job["function"]
    for arguments in job["arguments"]:
        target = getattr(owner(), name) if isinstance(owner, type) and hasattr(owner, name) else names[name]
        with contextlib.redirect_stdout(io.StringIO()):
            result = target(*arguments)
        tell(result=result)


def run_asserts(job: dict, tell) -> None:
    """Runs the program, then the tests, which raise where it is wrong."""
    names = {"__name__": "program", "__builtins__": builtins}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(job["program"], "program.py", "exec"), names)  # noqa: S102
        exec(compile(job["code"], "tests.py", "exec"), names)  # noqa: S102
        if job.get("function"):
            names["check"](names[job["function"]])
    tell(passed=job["nonce"])


FORMS = {"stdin": run_stdin, "call": run_calls, "assert": run_asserts}


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), int(sys.argv[2]))
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001
        traceback.print_exc(limit=-8)
        sys.stdout.flush()
        os._exit(1)
