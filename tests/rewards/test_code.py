"""Programs against tests, in the three published forms."""

import json

import pytest

from dqjax.rewards.code import CodeConfig, CodeGrader, last_program, same_output
from dqjax.rewards.sandbox import LimitsConfig

QUICK = CodeConfig(limits=LimitsConfig(wall=2.0, cpu=2.0))


def block(program, language="python"):
    return f"Here it is.\n\n```{language}\n{program}\n```\nDone."


STDIN = {"form": "stdin", "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10"}]}
CALL = {
    "form": "call",
    "function": "add",
    "cases": [{"input": "[1, 2]\n3", "output": "[4, 5]"}, {"input": "[]\n1", "output": "[]"}],
}
ASSERT = {
    "form": "assert",
    "function": "add",
    "head": "from typing import List\n\ndef add(xs: List[int]) -> int:\n    '''Adds.'''\n",
    "code": "def check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}


@pytest.mark.parametrize(
    ("tests", "program", "score", "detail"),
    [
        (STDIN, "print(sum(map(int, input().split())))", 1.0, ""),
        (STDIN, "a, b = map(int, input().split())\nprint(a * 2 if a == b else 0)", 0.0, "test 0: wrong output"),
        (STDIN, "print(3)", 0.0, "test 1: wrong output"),
        (STDIN, "while True: pass", 0.0, "test 0: "),
        (STDIN, "import os; os.fork()", 0.0, "PermissionError"),
        (STDIN, "def (", 0.0, "SyntaxError"),
        (CALL, "class Solution:\n    def add(self, xs, y):\n        return [x + y for x in xs]", 1.0, ""),
        (CALL, "def add(xs, y):\n    return tuple(x + y for x in xs)", 1.0, ""),
        (CALL, "def add(xs, y):\n    return [4, 5]", 0.0, "test 1: wrong result"),
        (CALL, "def add(xs, y):\n    return xs[0] and [x + y for x in xs]", 0.0, "test 1: exit code 1: IndexError"),
        (CALL, "class E:\n    def __eq__(self, other): return True\ndef add(xs, y): return E()", 0.0, "test 0"),
        (ASSERT, "def add(xs: List[int]) -> int:\n    return sum(xs)", 1.0, ""),
        (ASSERT, "    return sum(xs)", 1.0, ""),
        (ASSERT, "def add(xs):\n    return 3", 0.0, "AssertionError"),
        (ASSERT, "def add(xs):\n    raise SystemExit", 0.0, "before its tests"),
    ],
)
def test_forms(complete, tests, program, score, detail):
    (grade,) = CodeGrader(QUICK)([complete(block(program), "", tests=tests)])
    assert (grade.score, grade.failed) == (score, None)
    assert detail in grade.detail and bool(grade.detail) == (score < 1)


def test_partial_credit(complete):
    grader = CodeGrader(CodeConfig(partial=True))
    assert [
        g.score
        for g in grader([complete(block("print(3)"), "", tests=STDIN), complete(block("print(9)"), "", tests=STDIN)])
    ] == [0.5, 0.0]


def test_answers_without_a_program_are_wrong(complete):
    grader = CodeGrader(QUICK)
    texts = [
        "no program",
        "<think>\n" + block("print(3)") + "\n</think>\n\nsorry",
        "<think>\n" + block("print(3)"),
        block("int main;", "cpp"),
    ]
    grades = grader([complete(text, "", tests=STDIN) for text in texts])
    assert all(g.score == 0.0 and g.failed is None and g.detail for g in grades)


def test_bad_tests_are_failures(complete):
    grader, answer = CodeGrader(QUICK), block("print(1)")
    bad = [
        {"form": "stdin", "cases": []},
        {"form": "stdin"},
        {"form": "magic"},
        {"form": "call", "function": "f", "cases": [{"input": "not json", "output": "1"}]},
        "tests",
    ]
    assert all("tests" in g.failed for g in grader([complete(answer, "", tests=tests) for tests in bad]))


def test_last_program():
    assert last_program("```python\na\n```\n```py\nb\n```\n```cpp\nc\n```") == "b"
    assert last_program("```\na\n```") == "a"
    assert last_program("```python\nif x:\n    y\n    ```") == "if x:\n    y"
    assert last_program("```python\nnever closed") is None
    assert last_program("```bash\nls\n```") is None


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3\n", "3", True),
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("1.0 2", "1 2.00", True),
        ("1  2", "1 2", True),
        ("0.1", "0.10000001", False),
        ("yes", "YES", False),
        ("1\n2", "1 2", False),
        ("", "", True),
        ("", "1", False),
        ("nan", "1", False),
    ],
)
def test_same_output(printed, expected, same):
    assert same_output(printed, expected) is same


def test_results_are_json(complete):
    """Keys of an object are texts on both sides, floats are compared exactly, as LiveCodeBench does."""
    tests = {"form": "call", "function": "f", "cases": [{"input": "1", "output": json.dumps({"1": [0.5, None, True]})}]}
    (grade,) = CodeGrader(QUICK)([complete(block("def f(x): return {x: (0.5, None, True)}"), "", tests=tests)])
    assert grade.score == 1.0
