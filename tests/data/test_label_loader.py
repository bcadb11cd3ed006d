"""The source of labelled conversations: missing labels weigh nothing, weights are those of the global batch."""

import json

import jax
import numpy as np
import pytest

from dqjax.config import ConfigError
from dqjax.data.config import DataConfig
from dqjax.data.label_loader import open_labelled_data
from dqjax.losses.ordinal import weigh_labels


def row(i, **more):
    said = {"id": f"r{i}", "prompt": f"What is {i} + 1?", "response": "1" * (1 + 7 * i % 23)}
    return said | {"Reasoning_Verbosity": i % 10, "Cognitive_Difficulty": (3 * i) % 10} | more


def missing(i, *names):
    return {key: value for key, value in row(i).items() if key not in names}


@pytest.fixture
def open_data(write_rows, tmp_path, qwen3):
    def open(data=None, *, batch_rows=4, local_rows=None, **values):
        sources = write_rows([row(i) for i in range(40)] if data is None else data)
        settings = {"sources": sources, "row_length": 120, "seed": 3, "quarantine": str(tmp_path / "quarantine.jsonl")}
        return open_labelled_data(DataConfig(**settings | values), qwen3, batch_rows=batch_rows, local_rows=local_rows)

    return open


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_labels_reach_their_conversation_and_a_missing_one_is_never_zero(open_data):
    data = [
        row(0),
        missing(1, "Reasoning_Verbosity"),
        missing(2, "Cognitive_Difficulty") | {"difficulty": 5},
        row(3, Reasoning_Verbosity=None),
    ]
    batch = open_data(data, batch_rows=1, row_length=400).loader.next()
    order = np.argsort(np.where(batch.side["row"][0] < 0, 99, batch.side["row"][0]))[:4]
    np.testing.assert_array_equal(batch.side["verbosity"][0][order], [0, -1, 2, -1])
    np.testing.assert_array_equal(batch.side["difficulty"][0][order], [0, 3, -1, 9])


def test_weights_are_those_of_the_global_batch_on_any_number_of_hosts(open_data):
    data = [missing(i, "Cognitive_Difficulty") if i % 3 else row(i) for i in range(40)]
    whole, host = open_data(data).loader, open_data(data, local_rows=[1, 3]).loader
    for _ in range(4):
        batch = whole.next()
        equal(batch, weigh_labels(batch, ("verbosity", "difficulty"), classes=10))
        equal(jax.tree.map(lambda x: x[[1, 3]], batch), host.next())


def test_the_state_continues_the_same_batches(open_data):
    loader, other = open_data().loader, open_data().loader
    for _ in range(3):
        loader.next()
    other.set_state(json.loads(json.dumps(loader.get_state())))
    for _ in range(8):
        equal(loader.next(), other.next())


def test_held_out_conversations_weigh_one_in_all(open_data):
    data = open_data(validation=0.4, local_rows=[3])
    assert data.counts["held_out"] + data.counts["conversations"] == 40
    whole = open_data(validation=0.4).validation
    for name in ("verbosity_weight", "difficulty_weight"):
        assert sum(b.side[name].sum() for b in whole) == pytest.approx(1)
    assert len({jax.tree.structure(b) for b in data.validation}) == 1


def test_rows_without_labels_and_long_ones_are_quarantined(open_data, tmp_path):
    unlabelled = missing(5, "Reasoning_Verbosity", "Cognitive_Difficulty")
    wrong = [
        row(3, Reasoning_Verbosity="high"),
        row(4, Reasoning_Verbosity=10),
        row(6, Cognitive_Difficulty=-1),
        row(7, Cognitive_Difficulty="low"),
        row(8, Reasoning_Verbosity=True),
    ]
    data = open_data([row(0), unlabelled, row(2, response="1" * 300), *wrong], max_bad_share=0.8)
    assert (data.counts["conversations"], data.counts["bad"], data.counts["too_long"]) == (1, 6, 1)
    said = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [bad["line"] for bad in said] == [2, 3, 4, 5, 6, 7, 8]
    assert "no label in Reasoning_Verbosity or Cognitive_Difficulty" in said[0]["reason"]
    assert "Reasoning_Verbosity: expected a number from 0 to 9, got 10" in said[3]["reason"]
    for bad, name, got in zip(said[2:], "Rrccr", ("'high'", "10", "-1", "'low'", "True")):
        assert {"r": "Verbosity", "c": "ifficulty"}[name.lower()] in bad["reason"] and got in bad["reason"]
    with pytest.raises(ConfigError, match="1 of 2 rows are no usable labelled conversation"):
        open_data([row(0), unlabelled])
    with pytest.raises(ConfigError, match=r"first at .*:2: Reasoning_Verbosity: expected a number from 0 to 9, got 10"):
        open_data([row(0), row(1, Reasoning_Verbosity=10), row(2, Cognitive_Difficulty="low")])


def test_settings_of_documents_are_refused(open_data):
    with pytest.raises(ConfigError, match="data.thinking"):
        open_data(thinking="off")
