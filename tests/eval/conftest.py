"""Samplers without a model, and problems for them."""

import pathlib

import pytest

from dqjax.data.chat import parse_response
from dqjax.data.records import parse_row
from dqjax.eval.samplers import Sampled

EXAMPLES = pathlib.Path(__file__).parent / "examples"


@pytest.fixture
def examples():
    return EXAMPLES


@pytest.fixture
def problems():
    """problems(n): n problems `p0`, `p1`, ... whose answer is their number."""

    def make(n):
        return [
            parse_row({"id": f"p{i}", "question": f"What is {i}?", "answer": str(i), "difficulty": i % 3})[0]
            for i in range(n)
        ]

    return make


class Scripted:
    """A sampler that answers by a function of the request, and remembers what it was asked."""

    def __init__(self, answer):
        self._answer, self.asked = answer, []

    def __call__(self, requests):
        for request in requests:
            self.asked.append(request)
            text = self._answer(request)
            if request.thinking:
                text = f"<think>\nhm\n</think>\n\n{text}"
            response = parse_response(text)
            yield Sampled(
                text, response, tokens=10 + request.index, thinking_tokens=5 * request.thinking, truncated=False
            )


@pytest.fixture
def scripted():
    return Scripted
