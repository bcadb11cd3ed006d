"""Correctness of a final answer against the reference: mathematics, exact text, number, or multiple choice."""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import pydantic

from dqjax.config import Section
from dqjax.rewards import extract
from dqjax.rewards.types import Completion, Grade, could_not
from dqjax.rewards.workers import Workers

Kind = Literal["math", "exact", "number", "choice"]
LETTERS = "ABCDEFGHIJ"
SEARCHED = 4000  # characters at the end of an answer in which an unstated result is looked for

_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|\n")  # "about 5 dollars": the answer has to be looked for
_LETTER = re.compile(r"\(([A-Za-z])\)")
_WORDS = re.compile(r"[^\W\d_]{4,}(?: [^\W\d_]+)*")  # "Evelyn", "even integers"; shorter ones may be products, as xyz


class AnswerConfig(Section):
    """How final answers are compared.

    kind: `math` (equivalence by math-verify: fractions, sets, intervals, expressions, units and percent signs let be),
      `exact` (equal after normalisation), `number` (equal within `tolerance`), `choice` (the letter); `auto` takes
      `choice` where the problem has choices, else `math`. A problem's own `answer_kind` column wins.
    tolerance: for `number`, relative to max(1, |reference|).
    workers, timeout: processes and seconds an answer for math-verify.
    """

    kind: Literal["auto", "math", "exact", "number", "choice"] = "auto"
    tolerance: float = pydantic.Field(1e-6, ge=0)
    workers: int = pydantic.Field(2, ge=1)
    timeout: float = pydantic.Field(5.0, gt=0)


class AnswerGrader:
    """Score 1 for a right final answer, 0 for a wrong or missing one.

    The answer is read behind the think block only; a block that never closes has none. Cheap comparisons come first:
    normalised text, then exact numbers; only what is left goes to math-verify, in processes with a time limit. Two answers
    that are both plain numbers are settled without it.
    """

    def __init__(self, config: AnswerConfig = AnswerConfig()):
        self._config = config
        self._workers = Workers("dqjax.rewards.equivalence:equivalent", workers=config.workers, timeout=config.timeout)

    def __call__(self, completions: Sequence[Completion]) -> list[Grade]:
        grades: list[Grade | None] = [self._without_workers(c) for c in completions]
        open_ = [i for i, grade in enumerate(grades) if grade is None]
        requests = [_request(completions[i]) for i in open_]
        for i, request, reply in zip(open_, requests, self._workers.map(requests)):
            stated = request["prediction"] if request["stated"] else None
            grades[i] = could_not(f"math-verify: {reply.failed}") if reply.failed else Grade(float(reply.value), stated)
        return grades

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _without_workers(self, completion: Completion) -> Grade | None:
        """The grade, or None where math-verify has to decide."""
        problem, response = completion.problem, completion.response
        if problem.answer is None:
            return could_not("the problem has no reference answer")
        if not response.closed:
            return Grade(0.0, detail="the think block never closes")
        if not response.answer.strip():
            return Grade(0.0, detail="no answer behind the think block")
        if "\\boxed{" in response.answer and extract.last_boxed(response.answer) is None:
            return Grade(0.0, detail="a box that never closes")  # it may hold the first digits of a number
        match kind_of(completion, self._config.kind):
            case "choice":
                chosen = extract.choice(response.answer, choice_letters(completion))
                return Grade(float(chosen == problem.answer.strip(" ().").upper()), chosen)
            case "number":
                stated = extract.final_answer(response.answer)
                value = extract.number(stated) if stated is not None else None
                if value is None:
                    found = extract.last_number(response.answer if stated is None else stated)
                    value = extract.number(found) if found else None
                reference = extract.number(problem.answer)
                if reference is None:
                    return could_not(f"the reference answer {problem.answer!r} is no number")
                return Grade(
                    float(value is not None and self._near(value, reference)), None if value is None else str(value)
                )
            case "exact":
                stated = _statement(completion)
                return Grade(float(same_text(stated, problem.answer)), stated)
        stated = _statement(completion)
        if same_text(stated, problem.answer):
            return Grade(1.0, stated)
        ours, theirs = extract.number(stated), extract.number(problem.answer)
        if ours is not None and theirs is not None:
            return Grade(float(ours == theirs), stated)
        if _is_words(problem.answer):  # as an expression, "listen" is a product equal to "silent"
            return Grade(0.0, stated)
        return None

    def _near(self, value: Fraction, reference: Fraction) -> bool:
        return abs(value - reference) <= Fraction(self._config.tolerance) * max(Fraction(1), abs(reference))


def kind_of(completion: Completion, kind: str = "auto") -> Kind:
    """The comparison for a problem: its own column, the configured one, or what its columns suggest."""
    kind = completion.problem.extra.get("answer_kind", kind)
    return kind if kind != "auto" else "choice" if completion.problem.extra.get("choices") else "math"


def choice_letters(completion: Completion) -> str:
    """The letters of the problem's choices; A to J where it lists none."""
    choices = completion.problem.extra.get("choices")
    return LETTERS[: len(choices)] if choices else LETTERS


def same_text(a: str, b: str) -> bool:
    """Equal after normalisation; words without regard to case, single letters without regard to brackets."""
    a, b = (
        _LETTER.sub(r"\1", text) if len(text) == 3 else text for text in (extract.normalise(a), extract.normalise(b))
    )
    return a == b or (bool(_WORDS.fullmatch(b)) and a.casefold() == b.casefold())


def _is_words(text: str) -> bool:
    return "\\text{" in text and not re.search(r"\d", text) or bool(_WORDS.fullmatch(extract.normalise(text)))


def _statement(completion: Completion) -> str:
    """The stated final answer, else the whole answer."""
    answer = completion.response.answer
    stated = extract.final_answer(answer)
    return extract.unwrap(answer) if stated is None else stated


def _request(completion: Completion) -> dict:
    """What math-verify is asked: about an answer alone, or about a text in which it has to find one."""
    answer = completion.response.answer
    stated = extract.final_answer(answer)
    text = answer[-SEARCHED:] if stated is None else stated
    alone = extract.marked_answer(answer) is not None or not _PROSE.search(text)
    return {
        "reference": completion.problem.answer,
        "prediction": extract.unwrap(text) if alone else text,
        "stated": alone,
    }
