"""Form of a completion: one think block, opened once, closed once, before an answer that is not empty."""

from collections.abc import Sequence

from dqjax.rewards.types import Completion, Grade

OPEN, CLOSE = "<think>", "</think>"


def fault(completion: Completion) -> str | None:
    """What is wrong with the form; None where nothing is.

    Asked for in thinking mode, a completion is well-formed as

        <think> thoughts </think> answer         (the opening tag may be in the prompt: then it must not come again)

    and asked for without thinking, as an answer without tags. The end must not be cut off.
    """
    text = completion.text
    opened, closed = text.count(OPEN) + completion.opened, text.count(CLOSE)
    if completion.truncated:
        return "cut at the token limit"
    if not completion.thinking:
        return "a think block where none was asked for" if text.count(OPEN) or closed else _no_answer(text)
    if opened != 1 or closed != 1:
        return f"{opened} opening and {closed} closing tags"
    if not completion.opened and not text.lstrip().startswith(OPEN):
        return "text before the think block"
    thoughts, _, answer = text.rpartition(CLOSE)
    if not thoughts.replace(OPEN, "").strip():
        return "an empty think block"
    return "the tags are in the wrong order" if OPEN in answer else _no_answer(answer)


def _no_answer(text: str) -> str | None:
    return None if text.strip() else "no answer"


class FormatGrader:
    """Score 1 for a well-formed completion, 0 for any other; see `fault`."""

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        faults = [fault(c) for c in completions]
        return [Grade(float(f is None), detail=f or "") for f in faults]
