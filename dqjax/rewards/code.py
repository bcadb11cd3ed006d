"""Programs, graded by running their tests in a sandbox.

A problem holds its tests in `extra["tests"]`, in one of three forms:

    {"form": "stdin", "cases": [{"input": text, "output": text}, ...]}              LiveCodeBench, scripts
    {"form": "call", "function": name, "cases": [{"input": lines, "output": json}]} LiveCodeBench, functions
    {"form": "assert", "code": text, "function": name?, "head": text?}              HumanEval

See `sandbox` for what a program may do and for what is guaranteed.
"""

import concurrent.futures
import decimal
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic

from dqjax.config import Section
from dqjax.rewards.sandbox import LimitsConfig, call_function, ensure_confinement, run_asserts, run_script
from dqjax.rewards.types import Completion, Grade, could_not

_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:\n[ \t]*)?```", re.S)
_IMPORT = re.compile(r"^(?:import|from)\s.+$", re.M)


class CodeConfig(Section):
    """How programs are tested.

    partial: the share of tests passed as the reward, instead of all or nothing.
    workers: programs tested at the same time.
    limits: what a program may use, for each test.
    """

    partial: bool = False
    workers: int = pydantic.Field(2, ge=1)
    limits: LimitsConfig = LimitsConfig()


class CodeGrader:
    """Score 1 for a program that passes all tests, else 0 (or the share it passes, with `partial`).

    The program is the last fenced block of the answer behind the think block, Python ones first. Being too slow or too
    large is a wrong answer; only what is wrong with the tests is a failure to grade.

    Raises:
      NotImplementedError: programs cannot be confined on this machine.
    """

    def __init__(self, config: CodeConfig = CodeConfig()):
        ensure_confinement()
        self._config = config

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        with concurrent.futures.ThreadPoolExecutor(self._config.workers) as pool:
            return list(pool.map(self._grade, completions))

    def close(self) -> None:
        """Nothing is kept between calls."""

    def _grade(self, completion: Completion) -> Grade:
        tests = completion.problem.extra.get("tests")
        if not isinstance(tests, Mapping) or tests.get("form") not in _FORMS:
            return could_not(f"tests: expected a form out of {', '.join(_FORMS)}")
        if not completion.response.closed:
            return Grade(0.0, detail="the think block never closes")
        program = last_program(completion.response.answer)
        if program is None:
            return Grade(0.0, detail="no fenced program in the answer")
        try:
            passed, total, detail = _FORMS[tests["form"]](program, tests, self._config)
        except (KeyError, TypeError, ValueError) as e:
            return could_not(f"tests: {type(e).__name__}: {e}")
        score = passed / total if self._config.partial else float(passed == total)
        return Grade(score, detail=detail)


def last_program(text: str) -> str | None:
    """The last block fenced as Python, else the last one without a language; None without either."""
    blocks = _FENCE.findall(text)
    for languages in (("python", "python3", "py"), ("",)):
        if mine := [body for language, body in blocks if language.lower() in languages]:
            return mine[-1]
    return None


def same_output(printed: str, expected: str) -> bool:
    """LiveCodeBench's rule: as many lines, and each equal without outer spaces, or equal as a row of decimal numbers."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [decimal.Decimal(x) for x in a.split()] == [decimal.Decimal(x) for x in b.split()]
    except (decimal.InvalidOperation, ValueError):
        return False


def _stdin(program: str, tests: Mapping[str, Any], config: CodeConfig) -> tuple[int, int, str]:
    passed, detail, cases = 0, "", tests["cases"]
    for i, case in enumerate(cases):
        outcome = run_script(program, case["input"], config.limits)
        if outcome.ended is None and same_output(outcome.stdout, case["output"]):
            passed += 1
            continue
        detail = detail or f"test {i}: {outcome.ended or 'wrong output'}"
        if not config.partial:
            break
    return passed, _some(cases), detail


def _call(program: str, tests: Mapping[str, Any], config: CodeConfig) -> tuple[int, int, str]:
    cases = tests["cases"]
    arguments = [[json.loads(line) for line in case["input"].split("\n") if line.strip()] for case in cases]
    expected = [json.loads(case["output"]) for case in cases]
    outcome = call_function(program, tests["function"], arguments, config.limits)
    results = [verdict["result"] for verdict in outcome.verdicts if "result" in verdict][: len(cases)]
    right = [a == b for a, b in zip(results, expected)]
    wrong = right.index(False) if False in right else len(right)
    detail = (
        ""
        if wrong == len(cases)
        else f"test {wrong}: {'wrong result' if wrong < len(right) else outcome.ended or 'no result'}"
    )
    return sum(right), _some(cases), detail


def _assert(program: str, tests: Mapping[str, Any], config: CodeConfig) -> tuple[int, int, str]:
    head, function = tests.get("head", ""), tests.get("function")
    if function and not re.search(rf"\bdef\s+{re.escape(function)}\b", program):
        program = f"{head}\n{program}"  # the block goes on where the head stops
    else:
        program = "\n".join([*_IMPORT.findall(head), program])
    result = run_asserts(program, tests["code"], function, config.limits)
    return int(result is True), 1, "" if result is True else str(result)


def _some(cases: Sequence[Any]) -> int:
    if not cases:
        raise ValueError("the list of cases is empty")
    return len(cases)


_FORMS = {"stdin": _stdin, "call": _call, "assert": _assert}
