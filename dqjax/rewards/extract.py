r"""Final answers out of text: the last `\boxed` with its braces matched, answer tags, and the usual phrases.

The last statement of an answer wins over earlier ones: models correct themselves.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

LONGEST = 4000  # characters; a longer text is no final answer, and is not normalised

_BOXED = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_TAGS = re.compile(r"<(/?)answer>", re.I)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.M)
# Markdown's bold and headings may stand round the phrase.
_PHRASE = re.compile(
    r"\b(?:answer\s*(?:\*\*|__)?\s*(?:is|are|:|=)|final\s+answer\s*(?:\*\*|__)\s*\n)\s*(?:\*\*|__)?\s*:?", re.I
)
_REASON = re.compile(r"(?:[,;]\s+|\s+)(?:because|since|as|which|where|so)\b|\.\s")
_NUMBER = re.compile(r"[-+−]?\s?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:left|right|quad|qquad|displaystyle|limits)(?![a-zA-Z])|~")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}` or `\fbox{...}`, nested braces included; None without one.

    `\{` and `\}` are characters, not braces. A box that never closes (a truncated sample) is passed over. `\boxed 5`
    is TeX for a box round one token.
    """
    ends = _closing_braces(text)
    for match in reversed(list(_BOXED.finditer(text))):
        start = match.end()
        if start in ends:
            return text[start + 1 : ends[start]].strip()
        if text[start : start + 1] not in ("", "{") and match.group()[-1].isspace():
            token = re.match(r"\\[a-zA-Z]+|[^\s\\$}]+", text[start:])
            if token:
                return token.group().rstrip(".,")
    return None


def _closing_braces(text: str) -> dict[int, int]:
    """The place of the closing brace for each opening one that has it; escaped braces are no braces."""
    ends: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.S):
        if match.group() == "{":
            opened.append(match.start())
        elif match.group() == "}" and opened:
            ends[opened.pop()] = match.start()
    return ends


def last_tag(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`; None without one."""
    tags = list(_TAGS.finditer(text))
    for opening, closing in reversed(list(zip(tags, tags[1:]))):
        if (opening[1], closing[1]) == ("", "/"):
            return text[opening.end() : closing.start()].strip()
    return None


def marked_answer(text: str) -> str | None:
    """The answer that is set apart from the text: the last box, else the last `<answer>` tag, else the last `#### x`; None
    without any of these."""
    if (boxed := last_boxed(text)) is not None:
        return boxed
    if (tag := last_tag(text)) is not None:
        return tag
    hashes = _HASHES.findall(text)
    return hashes[-1].strip() if hashes else None


def final_answer(text: str) -> str | None:
    """The stated final answer of a text: the one that is set apart, else what follows the last "the answer is", up to the
    end of its sentence; None where no answer is stated."""
    if (marked := marked_answer(text)) is not None:
        return marked
    for match in reversed(list(_PHRASE.finditer(text))):
        line = text[match.end() :].lstrip().partition("\n")[0]
        if line:
            return unwrap(_REASON.split(line, maxsplit=1)[0])
    return None


def unwrap(text: str) -> str:
    """Without markdown's emphasis, dollar signs round the whole, and the full stop that ends a sentence."""
    text = text.strip().strip("*_").strip()
    text = text[:-1] if text.endswith(".") else text
    for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("`", "`")):
        if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
            inner = text[len(left) : -len(right)]
            if left not in inner:
                return inner.strip()
    return text.strip("*_").strip()


def normalise(text: str) -> str:
    r"""A form in which equal answers are often equal strings: no spacing commands, `\text{}` wrappers, `\dfrac`, degree
    signs, dollar or percent escapes, thousands separators or outer spaces; spaces only between word characters; case kept."""
    if len(text) > LONGEST:
        return text.strip()
    text = _SPACING.sub(" ", text.strip())
    while (plain := _TEXT.sub(r"\1", text)) != text:
        text = plain
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("−", "-").replace("\\%", "%")
    text = re.sub(r"\^\{?\\circ\}?|°|\\degree", "", text.replace("\\$", "").replace("$", ""))
    text = (
        re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text.strip())
        else text
    )
    text = re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text.strip())
    text = re.sub(r"\s+", " ", text)
    return text[:-1] if text.endswith(".") else text


def number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal, fraction or scientific number, thousands separators allowed; None for
    anything else. Exponents beyond 400 are anything else: their value would not fit in memory."""
    plain = normalise(text).replace(" ", "")
    if match := re.fullmatch(r"(-?)\\frac\{?(\d+)\}?\{?(\d+)\}?", plain):
        return Fraction(int(match[1] + match[2]), int(match[3])) if int(match[3]) else None
    if re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", plain):
        plain = plain.replace(",", "")
    match = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE]([-+]?\d+))?(/\d+)?", plain)
    if not match or len(plain) > 400 or abs(int(match[3] or 0)) > 400:
        return None
    head, slash, denominator = plain.partition("/")
    if slash and not int(denominator):
        return None
    return Fraction(head) / (int(denominator) if slash else 1)


def last_number(text: str) -> str | None:
    """The last number written in a text."""
    found = _NUMBER.findall(text)
    return found[-1].replace(" ", "") if found else None


def choice(text: str, letters: Sequence[str]) -> str | None:
    """The letter chosen in an answer: of the stated final answer, else the last one that stands alone; None without one.

    Args:
      letters: the valid ones, such as A, B, C, D. Capitals count; small ones only where the whole statement is one letter.
    """
    valid = "".join(letters)
    alone = re.compile(rf"(?<![A-Za-z\\])\(?([{valid}])\)?(?![A-Za-z'’])")
    stated = final_answer(text)
    plain = normalise(text if stated is None else stated).strip("() .:*")
    if len(plain) == 1 and plain.upper() in valid:
        return plain.upper()
    if stated is not None and (match := re.match(rf"[\W_]*([{valid}])(?![A-Za-z'’])", plain)):
        return match[1]
    found = alone.findall(text if stated is None else stated)
    if stated is not None and len(set(found)) > 1:
        return None  # "either A or B" is no choice
    return found[-1] if found else None
