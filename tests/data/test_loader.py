"""The training source: every row once an epoch, the same on any number of hosts, bit for bit after a resume."""

import logging
import threading
import time

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from dqjax.config import ConfigError
from dqjax.data.config import DataConfig
from dqjax.data.documents import Documents
from dqjax.data.loader import Loader, Stage, open_training_data
from dqjax.data.rows import plan_rows


def rows(count, start=0, **more):
    return [
        {
            "id": f"r{i}",
            "prompt": f"What is {i} + 1?",
            "response": "The answer is " + "1" * (1 + 7 * i % 23),
            "difficulty": i % 10,
        }
        | more
        for i in range(start, start + count)
    ]


@pytest.fixture
def open_data(write_rows, tmp_path, qwen3):
    def open(data=None, *, batch_rows=4, local_rows=None, reduction="token_mean", **values):
        sources = write_rows(rows(50) if data is None else data) if "sources" not in values else values.pop("sources")
        settings = {"sources": sources, "cache_dir": str(tmp_path / "cache"), "workers": 1, "row_length": 96, "seed": 3}
        config = DataConfig(**settings | values)
        return open_training_data(config, qwen3, batch_rows=batch_rows, local_rows=local_rows, reduction=reduction)

    return open


def take(loader, count):
    return [loader.next() for _ in range(count)]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def seen(batches):
    return [int(r) for b in batches for r in b.side["row"].ravel() if r >= 0]


def test_an_epoch_holds_every_document_once_in_an_order_of_its_own(open_data):
    data = open_data(batch_rows=1)
    epoch = data.counts["rows"]
    one, two = take(data.loader, epoch), take(data.loader, epoch)
    assert sorted(seen(one)) == sorted(seen(two)) == list(range(50))
    assert seen(one) != seen(two)
    assert data.loader.get_state() == {"epoch": 2, "next_row": 0}
    assert seen(take(open_data(batch_rows=1).loader, epoch)) == seen(one)
    assert seen(take(open_data(batch_rows=1, seed=4).loader, epoch)) != seen(one)


def test_batches_are_what_was_rendered(open_data, qwen3):
    data = open_data()
    batch = data.loader.next()
    assert all(leaf.dtype in (np.int32, np.float32) for leaf in jax.tree.leaves(batch))
    for r in range(4):
        for k, row in enumerate(batch.side["row"][r]):
            if row < 0:
                continue
            here = batch.segment_ids[r] == k + 1
            np.testing.assert_array_equal(batch.tokens[r, here], data.documents.ids_of(row))
            learnt = batch.targets[r, here][batch.token_weight[r, here] > 0]
            assert qwen3.decode(learnt) == f"The answer is {'1' * (1 + 7 * row % 23)}<|im_end|>"
    np.testing.assert_allclose(batch.token_weight.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_hosts_together_make_the_global_batch(open_data, reduction):
    whole = take(open_data(reduction=reduction).loader, 9)
    hosts = [take(open_data(local_rows=local, reduction=reduction).loader, 9) for local in ([0, 1], [2], [3])]
    for i, batch in enumerate(whole):
        joined = jax.tree.map(lambda *parts: np.concatenate(parts), *(host[i] for host in hosts))
        equal(joined, batch)
        np.testing.assert_allclose(batch.token_weight.sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("before", [0, 1, 7, 30])
def test_a_resume_is_bit_exact_wherever_it_stops(open_data, before):
    straight = take(open_data().loader, before + 12)
    first = open_data().loader
    take(first, before)
    state = first.get_state()
    first.close()
    second = open_data().loader
    second.set_state(state)
    for a, b in zip(straight[before:], take(second, 12)):
        equal(a, b)


def test_a_resume_on_other_hosts_and_batch_sizes_loses_and_repeats_no_row(open_data):
    epochs = 2
    data = open_data()
    total = epochs * data.counts["rows"]
    hosts = [open_data(local_rows=[i]).loader for i in range(4)]
    got = [row for host in hosts for row in seen(take(host, 5))]
    states = [host.get_state() for host in hosts]
    assert all(state == states[0] for state in states)
    resumed = open_data(batch_rows=3, local_rows=[0, 1]).loader, open_data(batch_rows=3, local_rows=[2]).loader
    for host in resumed:
        host.set_state(states[0])
    left = total - 20
    got += [row for host in resumed for row in seen(take(host, left // 3))]
    last = open_data(batch_rows=1).loader
    last.set_state(resumed[0].get_state())
    got += seen(take(last, left % 3))
    assert sorted(got) == sorted(epochs * list(range(50)))


def test_a_state_of_other_data_is_refused(open_data):
    loader = open_data().loader
    with pytest.raises(ValueError, match="was it saved with other data"):
        loader.set_state({"epoch": 0, "next_row": 10_000})


def test_prefetch_is_bounded_and_stops(open_data, monkeypatch):
    built = []
    original = Loader.batch_at
    monkeypatch.setattr(
        Loader, "batch_at", lambda self, position: (built.append(position), original(self, position))[1]
    )
    threads = threading.active_count()
    loader = open_data(prefetch=3).loader
    assert not built  # nothing runs before it is asked for
    take(loader, 5)
    time.sleep(0.3)
    assert 5 <= len(built) <= 5 + 3
    loader.close()
    loader.close()
    for _ in range(50):
        if threading.active_count() <= threads:
            break
        time.sleep(0.1)
    assert threading.active_count() <= threads
    assert loader.get_state()["next_row"] + loader.get_state()["epoch"] > 0
    loader.next()
    loader.close()


def test_curriculum(open_data, caplog):
    curriculum = {"stages": [{"below": 3, "epochs": 2}, {"at_least": 3, "below": 8}, {"epochs": 1}]}
    data = open_data(batch_rows=2, curriculum=curriculum)
    batches = take(data.loader, data.loader.total_batches)
    with pytest.raises(StopIteration):
        data.loader.next()
    with pytest.raises(StopIteration):
        data.loader.next()
    stages = [int(s) for b in batches for s in b.side["stage"].ravel() if s >= 0]
    assert stages == sorted(stages)
    by_stage = {s: [r for r, t in zip(seen(batches), stages) if t == s] for s in range(3)}
    easy, middle = ([i for i in range(50) if lo <= i % 10 < hi] for lo, hi in ((0, 3), (3, 8)))
    assert sorted(by_stage[0]) == sorted(2 * easy)
    assert sorted(by_stage[1]) == middle and sorted(by_stage[2]) == list(range(50))
    assert data.loader.batches_of(2) == -(-len(data.loader.stages[0].rows) * 2 // 2)
    for at in (1, data.loader.batches_of(2), data.loader.total_batches - 1):
        again = open_data(batch_rows=2, curriculum=curriculum).loader
        take(again, at)
        state, fresh = again.get_state(), open_data(batch_rows=2, curriculum=curriculum).loader
        fresh.set_state(state)
        equal(fresh.next(), batches[at])


def test_the_last_batch_of_a_curriculum_keeps_its_shape(open_data):
    curriculum = {"stages": [{"below": 1}]}
    data = open_data(batch_rows=3, curriculum=curriculum)
    *_, last = take(data.loader, data.loader.total_batches)
    assert last.tokens.shape == (3, 96)
    alone = open_data(batch_rows=64, curriculum=curriculum, local_rows=[63]).loader.next()
    assert (alone.segment_ids == 0).all() and alone.side.keys() == last.side.keys() and (alone.side["row"] == -1).all()


def test_an_empty_stage_and_a_curriculum_column(open_data):
    with pytest.raises(ConfigError, match="curriculum stage 0 .* has no document"):
        open_data(curriculum={"stages": [{"at_least": 99}]})
    data = open_data([r | {"level": 99} for r in rows(9)], curriculum={"column": "level", "stages": [{"at_least": 99}]})
    assert data.counts["documents"] == 9


def test_documents_in_no_stage_are_said(open_data, caplog):
    open_data([*rows(20), {"prompt": "x", "response": "y"}], curriculum={"stages": [{"below": 3}, {"at_least": 3}]})
    assert "1 of 21 documents are in no stage" in caplog.text


LONG = [{"id": "long", "prompt": "What is it?", "response": "0123456789" * 30}]


def test_too_long_documents(open_data, caplog):
    caplog.set_level(logging.INFO)
    data = open_data(rows(30) + LONG)
    assert data.counts["too_long"] == 1 and 30 not in seen(take(data.loader, data.counts["rows"]))
    assert [r.levelno for r in caplog.records if "over data.row_length" in r.message] == [logging.INFO]
    caplog.clear()
    assert open_data(rows(9) + LONG).counts["too_long"] == 1
    (record,) = [r for r in caplog.records if "over data.row_length = 96 and were dropped" in r.message]
    assert record.levelno == logging.WARNING and "1 of 10 documents (10.0%)" in record.message


def test_truncate_and_split(open_data):
    data = open_data(rows(9) + LONG, too_long="truncate", batch_rows=1)
    length = int(data.documents.lengths[9])
    assert length > 96 * 3
    (cut,) = [b for b in take(data.loader, data.counts["rows"]) if 9 in b.side["row"]]
    np.testing.assert_array_equal(cut.tokens[0], data.documents.ids_of(9)[:96])
    data = open_data(rows(9) + LONG, too_long="split", batch_rows=1)
    pieces = []
    for batch in take(data.loader, data.counts["rows"]):
        for k, row in enumerate(batch.side["row"][0]):
            if row == 9:
                here = batch.segment_ids[0] == k + 1
                assert batch.positions[0, here].tolist() == list(range(here.sum()))
                pieces.append(batch.tokens[0, here].tolist())
    pieces.sort(key=lambda p: (-len(p), p))
    assert sum(map(len, pieces)) == length
    assert sorted(t for p in pieces for t in p) == sorted(data.documents.ids_of(9).tolist())


def test_a_prompt_that_fills_the_row_teaches_nothing_and_is_dropped(open_data):
    data = open_data([*rows(9), {"id": "p", "prompt": "0123456789" * 30, "response": "1"}], too_long="truncate")
    assert 9 not in seen(take(data.loader, data.counts["rows"]))


def test_train_on_prompt(open_data):
    batch = open_data(train_on_prompt=True).loader.next()
    last = np.diff(batch.segment_ids, axis=1, append=0) != 0
    np.testing.assert_array_equal(batch.token_weight > 0, (batch.segment_ids > 0) & ~last)


def test_held_out_share_is_disjoint_by_question(open_data):
    twins = rows(40) + [row | {"id": row["id"] + "b", "prompt": row["prompt"].upper() + " "} for row in rows(40)]
    data = open_data(twins, validation=0.2)
    held = {data.validation.documents.ids[r] for r in seen(data.validation)}
    train = {data.documents.ids[r] for r in seen(take(data.loader, data.counts["rows"]))}
    assert held and not held & train and len(held | train) == 80
    assert {i.rstrip("b") for i in held}.isdisjoint({i.rstrip("b") for i in train})
    assert data.counts["held_out"] == len(held) == len(data.validation.documents)
    first = data.validation.documents
    assert first.prompt(0).tolist() == first.ids_of(0).tolist()[: first.answer_start[0]]


def test_a_held_out_file_removes_its_questions_from_training(open_data, write_rows, caplog):
    held = write_rows([row | {"prompt": f"  {row['prompt']}".lower()} for row in rows(5)], "held.jsonl")
    data = open_data(validation=held)
    assert data.counts["overlap_removed"] == 5 and data.counts["held_out"] == 5
    assert "5 training documents ask a held-out question" in caplog.text
    assert sorted(set(seen(take(data.loader, data.counts["rows"])))) == list(range(5, 50))


def test_evaluation_is_the_mean_over_its_tokens_in_a_fixed_order(open_data):
    data = open_data(validation=0.4, batch_rows=4)
    one, two = list(data.validation), list(data.validation)
    assert len(one) == len(data.validation)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert len({b.tokens.shape for b in one}) == 1
    np.testing.assert_allclose(sum(b.token_weight.sum() for b in one), 1, rtol=1e-5)
    parts = [list(open_data(validation=0.4, local_rows=local).validation) for local in ([0, 1, 2], [3])]
    for whole, *local in zip(one, *parts):
        equal(jax.tree.map(lambda *x: np.concatenate(x), *local), whole)


def test_weights_and_shares(open_data, write_rows):
    sources = [
        {"path": write_rows(rows(10), "a.jsonl"), "weight": 2},
        {"path": write_rows(rows(20, 10), "b.jsonl"), "weight": 0.5},
    ]
    data = open_data(sources=sources)
    got = seen(take(data.loader, data.counts["rows"]))[: data.counts["documents"]]
    assert data.counts["documents"] == 30 and data.sources == ("a", "b")
    sources = [s | {"weight": 1.0, "share": share} for s, share in zip(sources, (0.5, 0.5))]
    data = open_data(sources=sources, batch_rows=1)
    batches = take(data.loader, data.counts["rows"])
    source = np.concatenate([b.side["source"][b.side["source"] >= 0] for b in batches])
    assert len(got) == 30 and len(source) == 30 and (source == 0).sum() == 15


def test_what_a_loader_refuses(open_data):
    stage = open_data().loader.stages[0]
    with pytest.raises(ValueError, match="positions from 0 to 3"):
        Loader([stage], batch_rows=4, seed=0, local_rows=[4])
    with pytest.raises(ValueError, match="only the last stage"):
        Loader([Stage(stage.rows, None), stage], batch_rows=4, seed=0)
    with pytest.raises(ValueError, match="at least one row"):
        Loader([], batch_rows=4, seed=0)


def invented_documents(lengths, prompts):
    lengths = np.array(lengths, np.int64)
    return Documents(
        tokens=(np.arange(lengths.sum(), dtype=np.int32),),
        start=np.cumsum(lengths) - lengths,
        lengths=lengths,
        answer_start=np.array(prompts, np.int32),
        difficulty=np.full(len(lengths), np.nan),
        question=np.arange(len(lengths)),
        source=np.zeros(len(lengths), np.int32),
        ids=[str(d) for d in range(len(lengths))],
        sources=("x",),
    )


@hypothesis.given(st.data())
@hypothesis.settings(max_examples=25)
def test_any_split_over_hosts_and_any_stop_gives_the_same_batches(data):
    lengths = data.draw(st.lists(st.integers(2, 20), min_size=1, max_size=15))
    prompts = [data.draw(st.integers(1, n)) for n in lengths]
    prompts[0] = 1  # something to learn
    documents = invented_documents(lengths, prompts)
    planned, _ = plan_rows(
        documents, np.arange(len(lengths)), row_length=16, too_long=data.draw(st.sampled_from(["truncate", "split"]))
    )
    stages = [Stage(planned, data.draw(st.integers(1, 3))), Stage(planned, None)]
    batch_rows, at = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 6))
    host_of = data.draw(st.lists(st.integers(0, 2), min_size=batch_rows, max_size=batch_rows))

    def loader(local_rows=None):
        return Loader(stages, batch_rows=batch_rows, seed=7, local_rows=local_rows, prefetch=1)

    straight = loader()
    whole = take(straight, at + 1)[-1]
    state = loader()
    take(state, at)
    for host in range(3):
        mine = [i for i, h in enumerate(host_of) if h == host]
        if mine:
            resumed = loader(mine)
            resumed.set_state(state.get_state())
            equal(resumed.next(), jax.tree.map(lambda x: x[mine], whole))
            resumed.close()
    counted = loader().batch_at(0)
    if (counted.token_weight > 0).any():
        np.testing.assert_allclose(counted.token_weight.sum(), 1, rtol=1e-5)
    straight.close(), state.close()
