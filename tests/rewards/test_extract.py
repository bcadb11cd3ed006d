"""Final answers out of text."""

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import pytest

from dqjax.rewards import extract


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{5}", "5"),
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{b^{2}}}} done", r"\sqrt{\frac{a}{b^{2}}}"),
        (r"first \boxed{3}, no: \boxed{4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ x }", "x"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed 9.", "9"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{\text{a \} brace}}", r"\text{a \} brace}"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{2}}", "2"),
        (r"\boxedfoo{2}", None),
        (r"no box", None),
        (r"\boxed", None),
        (r"\boxed{{[(]}}", "{[(]}"),
    ],
)
def test_last_boxed(text, expected):
    assert extract.last_boxed(text) == expected


@hypothesis.given(
    st.recursive(
        st.sampled_from(["1", "x", r"\{", r"\}", r"\\"]), lambda s: st.lists(s).map(lambda p: "{" + "".join(p) + "}")
    )
)
def test_last_boxed_returns_balanced_content_whole(content):
    assert extract.last_boxed(rf"\boxed{{1}} so \boxed{{{content}}} holds") == content


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 42.", "42"),
        ("**Final Answer:** 42", "42"),
        ("**Answer: 42**", "42"),
        ("Final answer: $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("The final answer is: \\(x=3\\)", "x=3"),
        ("it is 5\n#### 1,234\n", "1,234"),
        ("<answer>12</answer> no <answer> 13 </answer>", "13"),
        ("answer: 1\nanswer: 2", "2"),
        ("The answer is 3 but \\boxed{4}", "4"),
        ("Thus 42", None),
        ("", None),
    ],
)
def test_final_answer(text, expected):
    assert extract.final_answer(text) == expected


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\text{Evelyn}", "Evelyn"),
        ("$5$", "5"),
        ("x + 1", "x+1"),
        ("90^\\circ", "90"),
        ("90°", "90"),
        ("1,234,567", "1234567"),
        (r"\left( 1, 2 \right)", "(1,2)"),
        (r"50\%", "50%"),
        ("3.", "3"),
        ("−3", "-3"),
        (r"\$18", "18"),
    ],
)
def test_normalise_makes_equal(a, b):
    assert extract.normalise(a) == extract.normalise(b)


@pytest.mark.parametrize(("a", "b"), [("12", "1 2"), ("(1,234)", "(1234)"), ("A", "a"), ("1,23", "123")])
def test_normalise_keeps_apart(a, b):
    assert extract.normalise(a) != extract.normalise(b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5", Fraction(5)),
        ("-0.25", Fraction(-1, 4)),
        ("1/3", Fraction(1, 3)),
        (r"\frac{1}{3}", Fraction(1, 3)),
        (r"-\frac12", Fraction(-1, 2)),
        ("1,234.5", Fraction(12345, 10)),
        ("2e3", Fraction(2000)),
        (".5", Fraction(1, 2)),
        ("1/0", None),
        ("1e999999999", None),
        ("5 cm", None),
        ("x", None),
        ("", None),
        ("1,23", None),
    ],
)
def test_number(text, expected):
    assert extract.number(text) == expected


@hypothesis.given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3))
def test_number_is_exact(value):
    assert extract.number(f"{value:f}") == Fraction(value)


@pytest.mark.parametrize(
    ("text", "expected"), [("a 3 b 4.5 c", "4.5"), ("it costs 1,200 dollars", "1,200"), ("none", None), ("2/3", "2/3")]
)
def test_last_number(text, expected):
    assert extract.last_number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Answer: C", "C"),
        ("Answer: $C$", "C"),
        ("**Answer: (B)**", "B"),
        ("\\boxed{D}", "D"),
        ("\\boxed{\\text{D}}", "D"),
        ("\\boxed{d}", "D"),
        ("The answer is B) 5 metres", "B"),
        ("The answer is C because A is wrong", "C"),
        ("First A, but B fits.\nSo the answer is B.", "B"),
        ("C", "C"),
        ("I would go with (A).", "A"),
        ("The answer is either one", None),
        ("\\boxed{12}", None),
        ("Answer: E", None),
        ("It is DNA", None),
        ("", None),
    ],
)
def test_choice(text, expected):
    assert extract.choice(text, "ABCD") == expected


def test_extraction_is_linear_on_hostile_text():
    """A long run of openings must not take quadratic time (a second would be a hang of the grader)."""
    import time

    began = time.perf_counter()
    for text in (
        "\\boxed{" * 2000,
        "{" * 100000,
        "answer is " * 20000,
        "<answer>" * 20000,
        "1," * 50000,
        "\\text{" * 20000,
    ):
        extract.final_answer(text)
        extract.normalise(text)
        extract.number(text)
        extract.choice(text[:20000], "ABCD")
    assert time.perf_counter() - began < 5
