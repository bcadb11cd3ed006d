"""Test problems in training data."""

import json

import pytest

from dqjax.config import ConfigError
from dqjax.data.records import parse_row
from dqjax.eval.overlap import find_overlap, training_records


def records(*questions):
    return [parse_row({"id": str(i), "question": q, "answer": "1"})[0] for i, q in enumerate(questions)]


LONG = "A farmer has seventeen sheep and all but nine of them run away into the deep dark forest"


def test_equal_and_similar_questions_are_found():
    test = records("What is 3 + 4?", LONG, "Name the capital of France.")
    training = records(
        "what is 3+4?", "Yesterday: " + LONG.lower() + " at night. How many stay?", "Name the capital of Peru."
    )
    overlap = find_overlap(test, training)
    assert (overlap.equal, overlap.similar, overlap.problems, overlap.rows) == (("0",), ("1",), 3, 3)
    assert str(overlap) == "1 of 3 questions occur in 3 training rows, 1 more share 10 words in a row (66.7% in all)"


def test_a_shared_template_is_no_overlap():
    ask = "State the final answer to the following arithmetic problem: {} + {} + {} + {} ="
    test = records(*(ask.format(i, i + 1, i + 2, i + 3) for i in range(20)))
    training = records(*(ask.format(i, i + 1, i + 2, i + 9) for i in range(20)))
    assert find_overlap(test, training).similar == ()
    assert len(find_overlap(test, test).equal) == 20


def test_training_files_are_streamed_and_bad_rows_passed_over(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(
        json.dumps({"question": "q", "answer": "1"}) + "\n{bad\n" + json.dumps({"prompt": "a", "response": "b"}) + "\n"
    )
    assert len(list(training_records([str(path)]))) == 2
    with pytest.raises(ConfigError, match="no data file"):
        list(training_records([str(tmp_path / "none.jsonl")]))
