"""Completions for graders."""

import pytest

from dqjax.data.chat import parse_response
from dqjax.data.records import parse_row
from dqjax.rewards.types import Completion


@pytest.fixture
def complete():
    """complete(text, answer, ...) → a Completion; unknown keywords become columns of the problem."""

    def make(
        text,
        answer="1",
        *,
        id="p",
        question="q?",
        tokens=10,
        truncated=False,
        thinking=True,
        opened=False,
        difficulty=None,
        **extra,
    ):
        row = {"id": id, "question": question, "answer": answer, "difficulty": difficulty, **extra}
        problem = parse_row(row)[0]
        return Completion(problem, text, parse_response(text, opened=opened), tokens, truncated, thinking, opened)

    return make
