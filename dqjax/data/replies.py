"""What a teacher's reply says: chain and solution, one integer, one word. What it does not say clearly is missing."""

import re

from dqjax.data.records import split_tags
from dqjax.data.teacher import Reply

_OPENING = re.compile(r"\s*(?:<think>|<\|begin_of_thought\|>)")
_DECORATION = re.compile(r"[\s*_`$.\"']+")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_JSON = re.compile(r"\{\s*\"\w+\"\s*:\s*\"?([^\"{},]*)\"?\s*\}")
_LABELLED = re.compile(
    r"(?:score|rating|verbosity|difficulty|level|verdict|correctness|answer)\W*(?:is|:|=)\W*([^\s*_`.,;]+)\W*", re.I
)
_OUT_OF = re.compile(r"(\S+?)\s*/\s*9")


class Unusable(ValueError):
    """A reply that cannot be a chain; the message is the reason."""


def split_reply(reply: Reply) -> tuple[str | None, str]:
    """(chain, solution) of a reply in any of the usual styles: `reasoning_content`, `<think>`, begin_of_thought.

    Raises:
      Unusable: the answer was cut at its limit, a chain never closes, or nothing follows it.
    """
    if reply.finish == "length":
        raise Unusable("cut at max_tokens")
    thought, solution = (reply.reasoning, reply.text) if reply.reasoning else split_tags(reply.text)
    if thought is None and _OPENING.match(solution):
        raise Unusable("a chain that never closes")
    if not solution.strip():
        raise Unusable("a chain without a solution")
    thought = thought.strip("\n") if thought and thought.strip() else None
    return thought, solution.strip("\n")


def answer_of(reply: Reply) -> str:
    """The reply without its chain; "" where there is none."""
    try:
        return split_reply(reply)[1]
    except Unusable:
        return ""


def read_integer(text: str, low: int = 0, high: int = 9) -> int | None:
    """The integer that the reply is, or states; None for anything else.

    A statement is a box, a JSON object with one key, `score: n` (or rating, level, ...) as its last line, or `n/9`. Two
    different statements, a fraction, a number outside low..high, or a number in the middle of a sentence are no score.
    """
    found = _statements(text)
    values = {_integer(part) for part in found}
    if len(values) != 1:
        return None
    (value,) = values
    return value if value is not None and low <= value <= high else None


def read_word(text: str, words: tuple[str, ...]) -> str | None:
    """The one of `words` that the reply is, or states, without regard to case; None for anything else."""
    found = {_DECORATION.sub("", part).lower() for part in _statements(text)}
    return found.pop() if len(found) == 1 and found <= set(words) else None


def _statements(text: str) -> list[str]:
    text = text.strip()
    if boxed := _BOXED.findall(text):
        return boxed
    if objects := _JSON.findall(text):
        return objects
    last = text.splitlines()[-1].strip() if text else ""
    if labelled := _LABELLED.fullmatch(last.strip("*_` ")):
        return [labelled[1]]
    return [text]


def _integer(text: str) -> int | None:
    text = _DECORATION.sub(" ", text).strip() if not re.search(r"\d\.\d", text) else text
    if (part := _OUT_OF.fullmatch(text)) is not None:
        text = part[1]
    return int(text) if re.fullmatch(r"[0-9]{1,3}", text) else None
