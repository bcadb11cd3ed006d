"""Final answers against references, of all kinds of comparison."""

import time

import pytest

from dqjax.rewards.answer import AnswerConfig, AnswerGrader
from dqjax.rewards.types import Completion


@pytest.fixture(scope="module")
def grader():
    grader = AnswerGrader(AnswerConfig(timeout=20.0, workers=1))
    yield grader
    grader.close()


EQUAL = [
    ("1/2", r"\boxed{\frac{1}{2}}"),
    ("1/2", r"\boxed{0.5}"),
    (r"\frac{1}{2}", r"The answer is $\frac12$."),
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}"),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\dfrac{1}{\sqrt{3}}}"),
    ("5", r"\boxed{5\text{ cm}}"),
    ("5", r"\boxed{5 \, \mathrm{cm}}"),
    ("18", r"\boxed{\$18}"),
    ("90", r"\boxed{90^\circ}"),
    (r"50\%", r"\boxed{50}"),
    ("0.5", r"\boxed{50\%}"),
    ("1234", r"\boxed{1,234}"),
    ("70000", r"\boxed{7\times10^4}"),
    ("(1,2]", r"\boxed{(1, 2]}"),
    (r"(-\infty, 3)", r"\boxed{(-\infty,3)}"),
    (r"[0,1] \cup [2,3]", r"\boxed{[0,1]\cup[2,3]}"),
    (r"\{1,2,3\}", r"\boxed{\{3, 2, 1\}}"),
    ("(3, \\frac{\\pi}{2})", r"\boxed{\left( 3, \frac{\pi}{2} \right)}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("5", r"\boxed{x = 5}"),
    ("x=5", r"\boxed{5}"),
    ("Evelyn", r"\boxed{\text{Evelyn}}"),
    (r"\text{even}", r"\boxed{\text{Even}}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}"),
    ("1+2i", r"\boxed{1 + 2i}"),
    ("-13", "-13"),
    ("25", "Adding up gives the sum.\n\nHence we get $25$."),
    ("7", "<think>\nI first had \\boxed{3}.\n</think>\n\nIt is \\boxed{7}."),
    ("5", "The answer is about 5 dollars."),
    ("42", "**Final Answer**\n\n42"),
    (r"\text{(C)}", r"\boxed{C}"),
    ("no solution", r"\boxed{\text{No solution}}"),
    ("2,3", r"\boxed{x=2, x=3}"),
    ("8", "So 3 + 5 = 8. Therefore, the total is 8 apples."),
    ("072", r"\boxed{72}"),
]

DIFFERENT = [
    ("5", r"\boxed{6}"),
    ("13", "-13"),
    ("(1,2]", r"\boxed{[1,2]}"),
    (r"\{1,2\}", r"\boxed{1}"),
    ("0.333", r"\boxed{1/3}"),
    ("1", r"\boxed{0.999999}"),
    ("listen", r"\boxed{silent}"),
    (r"\text{even}", r"\boxed{\text{odd}}"),
    ("5", r"\boxed{}"),
    ("5", r"\boxed{5"),
    ("12", r"\boxed{1} and \boxed{2}"),
    ("7", "<think>\nSo \\boxed{7}.\n</think>\n\nIt is \\boxed{8}."),
    ("7", "<think>\nSo \\boxed{7}."),
    ("7", "<think>\nSo \\boxed{7}.\n</think>\n\n"),
    ("7", ""),
    ("x^2+1", r"\boxed{(x+1)^2}"),
]


@pytest.mark.parametrize(("reference", "text"), EQUAL)
def test_equal_answers_are_right(grader, complete, reference, text):
    (grade,) = grader([complete(text, reference)])
    assert (grade.score, grade.failed) == (1.0, None), grade


@pytest.mark.parametrize(("reference", "text"), DIFFERENT)
def test_different_answers_are_wrong(grader, complete, reference, text):
    (grade,) = grader([complete(text, reference)])
    assert (grade.score, grade.failed) == (0.0, None), grade


def test_grades_come_in_order_and_name_the_answer(grader, complete):
    texts = [rf"\boxed{{{i}}}" if i % 2 else rf"\boxed{{\sqrt{{{i * i}}}}}" for i in range(12)]
    grades = grader([complete(text, str(i if i != 5 else 50)) for i, text in enumerate(texts)])
    assert [g.score for g in grades] == [float(i != 5) for i in range(12)]
    assert grades[4].answer == r"\sqrt{16}"


def test_what_takes_too_long_is_marked_and_costs_its_time_only(complete):
    hostile = [complete(r"\boxed{10^{10^{10}}}", "1"), complete(r"\boxed{9^{9^{9^{9}}} + x}", "2")]
    fine = complete(r"\boxed{\sqrt{4}}", "2")
    with AnswerGrader(AnswerConfig(timeout=1.0, workers=1)) as grader:
        assert grader([fine])[0].score == 1.0  # the worker is up
        began = time.monotonic()
        grades = grader([*hostile, fine])
        assert time.monotonic() - began < 60
    assert all(g.failed == "math-verify: timeout" and g.score == 0.0 for g in grades[:2]) and grades[2].score == 1.0


@pytest.mark.parametrize(
    ("kind", "reference", "text", "score"),
    [
        ("number", "0.333333", r"\boxed{1/3}", 1.0),
        ("number", "1000", "about 1,000 in all", 1.0),
        ("number", "1000", "the answer is 1001", 0.0),
        ("number", "5", "none", 0.0),
        ("exact", "[[1, 2], [3, 4]]", "[[1, 2], [3, 4]]", 1.0),
        ("exact", "[[1, 2], [3, 4]]", "[[1, 2], [4, 3]]", 0.0),
        ("exact", "1/2", r"\boxed{0.5}", 0.0),
        ("choice", "C", "Answer: C", 1.0),
        ("choice", "(C)", "Answer: C", 1.0),
        ("choice", "C", "Answer: D", 0.0),
        ("choice", "C", "I do not know", 0.0),
    ],
)
def test_kinds(grader, complete, kind, reference, text, score):
    assert grader([complete(text, reference, answer_kind=kind)])[0].score == score


def test_choices_make_a_choice_and_bound_its_letters(grader, complete):
    assert grader([complete("Answer: B", "B", choices=["x", "y"])])[0].score == 1.0
    assert grader([complete("Answer: D", "D", choices=["x", "y"])])[0].answer is None


def test_failures_say_why(grader, complete):
    record = complete("5", "5")
    no_reference = Completion(type(record.problem)("p", record.problem.messages, "p"), "5", record.response, 1)
    assert "no reference" in grader([no_reference])[0].failed
    assert "no number" in grader([complete("5", "five", answer_kind="number")])[0].failed
    assert grader([]) == []
