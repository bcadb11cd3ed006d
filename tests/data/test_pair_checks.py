"""A rejected answer that is right after all is reported; one that is meant to be right is not."""

import json
import logging

from dqjax.data.config import DataConfig
from dqjax.data.pair_loader import open_pair_data


def pair(i, rejected, **more):
    said = {"id": f"p{i}", "prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": rejected}
    return said | {"answer": str(i + 1)} | more


def test_right_rejected_answers_are_counted_and_the_first_is_named(write_rows, qwen3, caplog):
    rows = [
        pair(0, "It is 7."),
        pair(1, "The answer is 2"),
        pair(2, r"\boxed{3.0}"),
        pair(3, "4!", gap="small", beta=0.1),  # a refined chain against the right one it was made from
        pair(4, "It is five", answer=None),
    ]
    with caplog.at_level(logging.WARNING):
        data = open_pair_data(DataConfig(sources=write_rows(rows), row_length=200), qwen3, batch_rows=2)
    assert data.counts["rejected_right"] == 2 and data.counts["pairs"] == 5
    assert "2 of 3 rejected answers reach the reference answer" in caplog.text
    assert "the first is p1 at" in caplog.text and "rows.jsonl:2" in caplog.text


def test_nothing_is_said_where_all_is_well(write_rows, qwen3, caplog):
    rows = [json.loads(json.dumps(pair(i, "It is 99."))) for i in range(3)]
    with caplog.at_level(logging.WARNING):
        data = open_pair_data(DataConfig(sources=write_rows(rows), row_length=200), qwen3, batch_rows=2)
    assert data.counts["rejected_right"] == 0 and not caplog.text
