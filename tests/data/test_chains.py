"""Chains are right, can be checked line by line, and end where reasoning-gym's answer is."""

import re

import hypothesis
import hypothesis.strategies as st
import pytest

from dqjax.data.chains import REMARK, write_chain, write_hasty_chain, write_mistaken_chain


def test_columns_by_hand():
    assert write_chain("41 - 54 + 9 + 99", "95", "columns").splitlines() == [
        "41 - 54: 54-41 -: 4-1-0=3 5-4-0=1 | -13",
        "-13 + 9: 13-9 -: 13-9-0=4 1-0-1=0 | -4",
        "-4 + 99: 99-4 +: 9-4-0=5 9-0-0=9 | 95",
    ]
    assert write_chain("87 + 70 - 57", "100", "columns") == (
        "87 + 70: 87+70 +: 7+0+0=7 8+7+0=15 | 157\n157 - 57: 157-57 +: 7-7-0=0 5-5-0=0 1-0-0=1 | 100"
    )


def test_other_styles():
    assert write_chain("41 - 54 + 9", "-4", "running") == "41 - 54 = -13\n-13 + 9 = -4"
    assert write_chain("41 - 54 + 9", "-4", "answer") is None
    columns, checked = (write_chain("41 - 54 + 9", "-4", style) for style in ("columns", "checked"))
    assert checked == f"{columns}\n{REMARK}"


def test_a_hasty_chain_leaves_out_the_last_term():
    columns = write_chain("41 - 54 + 9 + 99", "95", "columns").splitlines()
    assert write_hasty_chain("41 - 54 + 9 + 99") == ("\n".join(columns[:2]), "-4")
    with pytest.raises(ValueError, match="expected three terms"):
        write_hasty_chain("41 - 54")


@pytest.mark.parametrize("style", ["columns", "checked", "running", "answer"])
def test_a_chain_that_ends_elsewhere_is_refused(style):
    with pytest.raises(ValueError, match="ends in -4, reasoning-gym says 5"):
        write_chain("41 - 54 + 9", "5", style)
    with pytest.raises(ValueError, match="expected terms"):
        write_chain("3 * 4", "12", style)


LINE = re.compile(r"(-?\d+) ([+-]) (-?\d+): (\d+)([+-])(\d+) ([+-]): (.+) \| (-?\d+)")
COLUMN = re.compile(r"(\d+)([+-])(\d)([+-])([01])=(\d+)")


def check_line(line):
    """An independent reader of the grammar: every number in a line follows from what stands before it."""
    total, op, term, x, task, y, sign, columns, result = LINE.fullmatch(line).groups()
    a, b = int(total), int(term) if op == "+" else -int(term)
    assert int(result) == a + b
    assert sign == ("-" if a + b < 0 else "+")
    assert {int(x), int(y)} == {abs(a), abs(b)}
    assert abs(int(result)) == (int(x) + int(y) if task == "+" else int(x) - int(y))
    columns, carry, digits = columns.split(" "), 0, ""
    for i, column in enumerate(columns):
        d, op1, e, op2, c, out = COLUMN.fullmatch(column).groups()
        assert (
            op1 == op2 == task
            and int(c) == carry
            and int(d) % 10 == int(x) // 10**i % 10
            and int(e) == int(y) // 10**i % 10
        )
        if task == "+":
            assert int(d) <= 9 and int(out) == int(d) + int(e) + carry
            carry = int(out) // 10
            digits = (out if i == len(columns) - 1 else out[-1]) + digits
        else:
            carry = int(int(d) > 9)
            assert 0 <= int(out) == int(d) - int(e) - int(c) <= 9
            digits = out + digits
    assert int(digits) == abs(int(result))
    return a, int(result)


@hypothesis.given(
    st.lists(st.integers(-999, 999), min_size=1, max_size=6), st.lists(st.sampled_from("+-"), min_size=5, max_size=5)
)
def test_every_line_follows_from_itself(terms, ops):
    expression, total = str(terms[0]), terms[0]
    for op, term in zip(ops, terms[1:]):
        expression += f" {op} {term}"
        total += term if op == "+" else -term
    lines = write_chain(expression, str(total), "columns").splitlines()
    assert len(lines) == len(terms) - 1
    running = terms[0]
    for line in lines:
        before, after = check_line(line)
        assert before == running
        running = after
    assert running == total


@hypothesis.given(st.lists(st.integers(-9999, 9999), min_size=2, max_size=6), st.data())
def test_a_mistaken_chain_has_one_wrong_digit_and_is_right_again_from_there(terms, data):
    """Up to the wrong column all is as in the right chain; every later line passes the reader; the answer is wrong."""
    ops = [data.draw(st.sampled_from("+-")) for _ in terms[1:]]
    expression = " ".join([str(terms[0]), *(f"{op} {term}" for op, term in zip(ops, terms[1:]))])
    right = eval(expression.replace("--", "- -"))  # noqa: S307 - integers and signs of our own
    chain, answer = write_mistaken_chain(expression)
    assert (chain, answer) == write_mistaken_chain(expression) and answer != str(right)
    mistaken, whole = chain.splitlines(), write_chain(expression, str(right), "columns").splitlines()
    (wrong,) = [i for i, line in enumerate(mistaken) if not passes(line)]
    assert mistaken[:wrong] == whole[:wrong]
    theirs, ours = ([*COLUMN.finditer(LINE.fullmatch(lines[wrong])[8])] for lines in (whole, mistaken))
    (slip,) = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a[0] != b[0]]
    assert theirs[slip].groups()[:5] == ours[slip].groups()[:5]  # the result of one column, and nothing else
    assert chain.endswith(f"| {answer}")


@hypothesis.given(st.lists(st.integers(0, 99), min_size=2, max_size=5))
def test_more_mistakes_still_end_in_a_wrong_answer(terms):
    expression = " + ".join(map(str, terms))
    chain, answer = write_mistaken_chain(expression, more=1.0)
    assert answer != str(sum(terms)) and chain.endswith(f"| {answer}")
    assert not all(map(passes, chain.splitlines()))


def passes(line):
    try:
        check_line(line)
    except AssertionError:
        return False
    return True
