"""Worked chains for reasoning-gym's `chain_sum`, in four styles.

`columns` works in digits, least significant first, so that a tiny model needs nothing it cannot look up in the line::

    41 - 54 + 9 =

    41 - 54: 54-41 -: 4-1-0=3 5-4-0=1 | -13        x-y, where x is the larger magnitude; then the sign of the result
    -13 + 9: 13-9 -: 13-9-0=4 1-0-1=0 | -4         borrow: the ten joins the upper digit, the next column subtracts 1

    line    = total op term ": " task " " sign ": " columns " | " result
    task    = x "+" y   where the signed total and the signed term share their sign
            | x "-" y   where they do not; x >= y
    sign    = "+" | "-"  of the result ("+" for 0)
    column  = d "+" d "+" carry "=" sum            a sum over 9 carries 1; the last column writes it out
            | d "-" d "-" borrow "=" digit         d is 10..19 where this column borrows from the next

The result is the last column's sum, then the last digits of the others from right to left, without leading zeros.

`checked` is `columns` and a remark that says nothing more: as right, and longer. `running` keeps the running totals alone
(`41 - 54 = -13`), `answer` has no chain.

`write_hasty_chain` writes columns that end before the last term, `write_mistaken_chain` columns with wrong digits, from
which everything behind them follows.
"""

import random
import re
from collections.abc import Mapping
from typing import Literal

Style = Literal["columns", "checked", "running", "answer"]

REMARK = " ".join(["State the final answer."] * 5)

_EXPRESSION = re.compile(r"-?\d+(?: [+-] -?\d+)*")


def write_chain(expression: str, answer: str, style: Style) -> str | None:
    """The chain for an expression such as `41 - 54 + 9`; None for the style `answer`.

    Args:
      expression: terms joined by ` + ` and ` - `, as reasoning-gym's metadata has it.
      answer: reasoning-gym's result, which the chain must reach.

    Raises:
      ValueError: not such an expression, or the chain ends elsewhere.
    """
    total, rest = _terms(expression)
    lines = []
    for op, term in rest:
        head, signed = f"{total} {op} {term}", term if op == "+" else -term
        if style in ("columns", "checked"):
            work, result = _columns(total, signed)
            lines.append(f"{head}: {work} | {result}")
        else:
            result = total + signed
            lines.append(f"{head} = {result}")
        total = result
    if str(total) != answer:
        raise ValueError(f"the chain for {expression!r} ends in {total}, reasoning-gym says {answer}")
    if style == "checked":
        lines.append(REMARK)
    return None if style == "answer" else "\n".join(lines)


def write_hasty_chain(expression: str) -> tuple[str, str]:
    """(chain, answer) in the style `columns` that leaves out the last term, and so ends in a wrong answer.

    Raises:
      ValueError: not an expression that `write_chain` takes, or one of fewer than three terms.
    """
    total, rest = _terms(expression)
    if len(rest) < 2:
        raise ValueError(f"expected three terms or more, got {expression!r}")
    answer = str(total + sum(term if op == "+" else -term for op, term in rest[:-1]))
    return write_chain(expression.rsplit(" ", 2)[0], answer, "columns"), answer


def write_mistaken_chain(expression: str, more: float = 0.0) -> tuple[str, str]:
    """(chain, answer) in the style `columns` with one wrong digit at least, drawn by the expression.

    A wrong digit is the last one of a column's result; carries stay, and all that follows is computed from the wrong
    total, so that only the arithmetic of its column gives it away. Where several would cancel out, there is only one.

    Args:
      more: chance of every other column to be wrong too.

    Raises:
      ValueError: not an expression that `write_chain` takes, or one without an operation.
    """
    total, rest = _terms(expression)
    if not rest:
        raise ValueError(f"expected two terms or more, got {expression!r}")
    rng = random.Random(expression)
    right = total + sum(term if op == "+" else -term for op, term in rest)
    wrong_line, lines = rng.randrange(len(rest)), []
    for i, (op, term) in enumerate(rest):
        signed = term if op == "+" else -term
        width = max(len(str(abs(total))), len(str(abs(term))))
        slips = {rng.randrange(width)} if i == wrong_line else set()
        slips |= {column for column in range(width) if rng.random() < more}
        work, result = _columns(total, signed, {column: rng.randint(1, 9) for column in sorted(slips)})
        lines.append(f"{total} {op} {term}: {work} | {result}")
        total = result
    return write_mistaken_chain(expression) if total == right else ("\n".join(lines), str(total))


def _terms(expression: str) -> tuple[int, list[tuple[str, int]]]:
    """The first term, and the others with their operations."""
    if not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"expected terms joined by ' + ' and ' - ', got {expression!r}")
    first, *rest = expression.split(" ")
    return int(first), list(zip(rest[::2], map(int, rest[1::2])))


def _columns(a: int, b: int, slips: Mapping[int, int] = {}) -> tuple[str, int]:
    """The work of a + b, and the result as it is read off the columns (never computed otherwise).

    slips: column → 1 … 9: the last digit of that column's result is off by so much, modulo 10.
    """
    same_sign = (a < 0) == (b < 0) or not a or not b
    x, y = (abs(a), abs(b)) if same_sign else sorted((abs(a), abs(b)), reverse=True)
    negative = (a if abs(a) >= abs(b) else b) < 0 and (same_sign or x != y)
    width, carry, columns, digits = max(len(str(x)), len(str(y))), 0, [], []
    for i in range(width):
        dx, dy = x // 10**i % 10, y // 10**i % 10
        if same_sign:
            value = _slipped(dx + dy + carry, slips.get(i, 0))
            columns.append(f"{dx}+{dy}+{carry}={value}")
            digits.append(value if i == width - 1 else value % 10)
            carry = value // 10
        else:
            borrow = dx < dy + carry
            value = _slipped(dx + 10 * borrow - dy - carry, slips.get(i, 0))
            columns.append(f"{dx + 10 * borrow}-{dy}-{carry}={value}")
            digits.append(value)
            carry = int(borrow)
    magnitude = int("".join(map(str, reversed(digits))))
    task = f"{x}{'+' if same_sign else '-'}{y} {'-' if negative else '+'}"
    return f"{task}: {' '.join(columns)}", -magnitude if negative else magnitude


def _slipped(value: int, slip: int) -> int:
    return value // 10 * 10 + (value + slip) % 10
