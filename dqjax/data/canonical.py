r"""Problem texts in a form in which copies are equal, whatever their case, spacing, LaTeX and wording of numbers.

"What is $\dfrac{1}{2}$ of twenty-four?"   →   what is frac 1 2 of 24
"""

import re

from dqjax.data.records import normalise_question

_DRESS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname|mbox|displaystyle)(?![a-z])|\\[()\[\]]|[${}]")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-z])")
_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_TOKEN = re.compile(r"[^\W_]+(?:\.\d+)?|[-+*/=<>^]")

_SMALL = {
    word: value
    for value, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {
    word: 10 * value for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6}


def tokens(text: str) -> list[str]:
    """Words, numbers and operators of a text in canonical form."""
    text = _FRACTION.sub(r"\\frac", normalise_question(text)).replace("{,}", ",")
    text = _COMMA.sub("", _DRESS.sub(" ", text))
    return _numbers(_TOKEN.findall(text))


def number_bag(parts: list[str]) -> tuple[str, ...]:
    """The numbers among `tokens`, sorted: problems that differ in one of them are different problems."""
    return tuple(sorted(part for part in parts if part[0].isdigit()))


def _numbers(parts: list[str]) -> list[str]:
    """Runs of number words as digits: `twenty`, `-`, `five` is 25, `two hundred` is 200."""
    made: list[str] = []
    i = 0
    while i < len(parts):
        if parts[i] not in _SMALL and parts[i] not in _TENS:
            made.append(parts[i])
            i += 1
            continue
        total = current = 0
        while i < len(parts):
            word = parts[i]
            if word in _TENS and current % 100 == 0:
                current += _TENS[word]
            elif word in _SMALL and (
                current % 100 == 0 or (current % 100 >= 20 and current % 10 == 0 and 0 < _SMALL[word] < 10)
            ):
                current += _SMALL[word]
            elif word == "hundred" and 0 < current < 10:
                current *= 100
            elif word in _SCALES and word != "hundred" and current:
                total, current = total + current * _SCALES[word], 0
            elif (
                word == "-"
                and current % 100 in _TENS.values()
                and parts[i + 1 : i + 2]
                and 0 < _SMALL.get(parts[i + 1], 0) < 10
            ):
                pass  # the hyphen of twenty-five
            else:
                break
            i += 1
        made.append(str(total + current))
    return made
