"""The source of pairs: both sequences in one row, weights over the global batch, one counter as its state."""

import json

import jax
import numpy as np
import pytest

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat
from dqjax.data.config import DataConfig
from dqjax.data.pair_loader import closing_ids, open_pair_data
from dqjax.losses.pairs import count_pairs, weigh_pairs


def pair(i, **more):
    return {
        "id": f"p{i}",
        "prompt": f"What is {i} + 1?",
        "chosen": "The answer is " + "1" * (1 + 7 * i % 23),
        "rejected": "2" * (1 + 5 * i % 11),
    } | more


@pytest.fixture
def open_data(write_rows, tmp_path, qwen3):
    def open(data=None, *, batch_rows=4, local_rows=None, columns=(), whole=False, **values):
        sources = write_rows([pair(i) for i in range(50)] if data is None else data)
        settings = {"sources": sources, "row_length": 160, "seed": 3, "quarantine": str(tmp_path / "quarantine.jsonl")}
        options = {"batch_rows": batch_rows, "local_rows": local_rows, "columns": columns, "whole": whole}
        return open_pair_data(DataConfig(**settings | values), qwen3, **options)

    return open


def take(loader, count):
    return [loader.next() for _ in range(count)]


def numbers(batches):
    """The pairs of batches, by number, from the chosen sequences."""
    return [int(n) for b in batches for n in b.side["row"][b.side["chosen"] == 1]]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_an_epoch_holds_every_pair_once_in_an_order_of_its_own(open_data):
    data = open_data(batch_rows=1)
    one, two = take(data.loader, data.counts["rows"]), take(data.loader, data.counts["rows"])
    assert sorted(numbers(one)) == sorted(numbers(two)) == list(range(50))
    assert numbers(one) != numbers(two)


def test_a_pair_stays_in_its_row_and_weighs_its_share_of_the_global_batch(open_data):
    data = open_data()
    for batch in take(data.loader, 5):
        assert count_pairs(batch) == (batch.side["chosen"] == 1).sum()  # raises where a pair is not whole in its row
        equal(batch, weigh_pairs(batch))


def test_hosts_make_the_rows_of_one_global_batch(open_data):
    whole = open_data()
    hosts = [open_data(local_rows=rows) for rows in ([0, 2], [1, 3])]
    for _ in range(4):
        expected, parts = whole.loader.next(), [host.loader.next() for host in hosts]
        equal(jax.tree.map(lambda x: x[[0, 2]], expected), parts[0])
        equal(jax.tree.map(lambda x: x[[1, 3]], expected), parts[1])


def test_the_state_continues_the_same_batches(open_data):
    loader = open_data().loader
    take(loader, 5)
    state, expected = json.loads(json.dumps(loader.get_state())), take(loader, 7)
    other = open_data().loader
    other.set_state(state)
    for a, b in zip(expected, take(other, 7), strict=True):
        equal(a, b)


def test_sequences_are_what_is_served(open_data, qwen3):
    """Prompt and answer as rendered, trained on the answer alone; `whole` ends as the template ends a conversation."""
    batch = open_data([pair(3)], batch_rows=1, whole=True).loader.next()
    said = [{"role": "user", "content": "What is 3 + 1?"}, {"role": "assistant", "content": pair(3)["chosen"]}]
    served = qwen3.apply_chat_template(said, tokenize=False, enable_thinking=False)
    ids = batch.tokens[0][batch.sequence_index[0] == 0]
    assert qwen3.decode(ids) == served and served.endswith("<|im_end|>\n")
    plain = open_data([pair(3)], batch_rows=1).loader.next()
    here = plain.sequence_index[0] == 0
    answer = qwen3.decode(plain.targets[0][here & (plain.token_weight[0] != 0)])
    assert answer == pair(3)["chosen"] + "<|im_end|>"
    assert closing_ids(ChatFormat.of(qwen3)) == qwen3("\n")["input_ids"]


def test_unusable_pairs_are_quarantined_with_the_reason(open_data, tmp_path):
    rows = [
        *[pair(i) for i in range(8)],
        pair(8, rejected=pair(8)["chosen"]),
        pair(9, chosen=" "),
        pair(10, chosen="1" * 400),
        pair(11, rejected="<think>\n2\n</think>\n\n2"),
    ]
    data = open_data(rows, max_bad_share=0.5)
    assert (data.counts["pairs"], data.counts["bad"], data.counts["too_long"]) == (8, 3, 1)
    said = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in said] == [9, 10, 11, 12]
    for row, reason in zip(said, ("equal", "empty", "over data.row_length = 160", "different prompts")):
        assert reason in row["reason"]
    with pytest.raises(ConfigError, match=r"3 of 12 rows are no usable pair.*first at .*:9: chosen and rejected are equal"):
        open_data(rows)


def test_number_columns_reach_the_batch_or_are_asked_for(open_data):
    rows = [pair(i, beta=(0.1, 0.5)[i % 2]) for i in range(6)]
    batch = open_data(rows, columns=("beta",)).loader.next()
    chosen = batch.side["chosen"] == 1
    expected = [(0.1, 0.5)[n % 2] for n in batch.side["row"][chosen]]
    np.testing.assert_array_equal(batch.side["beta"][chosen], np.float32(expected))
    with pytest.raises(ConfigError, match="beta: expected above 0, got 0"):
        open_data([pair(0, beta=0)], columns=("beta",))
    with pytest.raises(ConfigError, match="margin: expected a number, got None"):
        open_data(columns=("margin",))


def test_held_out_pairs_share_no_question_and_weigh_one_in_all(open_data, tmp_path):
    rows = [pair(i % 20, id=f"p{i}", rejected=f"no {i}") for i in range(60)]
    data = open_data(rows, validation=0.3)
    held = data.validation.pairs
    assert 0 < len(held) < 60 and data.counts["held_out"] + data.counts["pairs"] == 60
    trained = data.pairs.question[numbers(take(data.loader, 3 * data.counts["rows"]))]
    assert not set(trained) & set(held.question)
    weights = [b.side["weight"][b.side["chosen"] == 1].sum() for b in data.validation]
    assert sum(weights) == pytest.approx(1)
    assert sorted(numbers(data.validation)) == list(range(len(held)))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(pair(i)) + "\n" for i in range(2)))
    data = open_data(rows, validation=str(tmp_path / "held.jsonl"))
    assert data.counts["overlap_removed"] == 6 and data.counts["held_out"] == 2


def test_a_host_without_rows_of_the_last_held_out_batch_has_the_same_tree(open_data):
    data = open_data(validation=0.5, local_rows=[3])
    batches = list(data.validation)
    assert len({jax.tree.structure(b) for b in batches}) == 1
    assert len({tuple(x.shape for x in jax.tree.leaves(b)) for b in batches}) == 1
    assert not (batches[-1].segment_ids > 0).any() and not batches[-1].side["weight"].any()


@pytest.mark.parametrize(("key", "value"), [("too_long", "split"), ("train_on_prompt", True), ("curriculum", {"stages": [{}]})])
def test_settings_of_documents_are_refused(open_data, key, value):
    with pytest.raises(ConfigError, match=f"data.{key}: pairs know only"):
        open_data(**{key: value})
