"""Cached teacher rows: each place gets its own, whatever the order, the host or the resumption; damage is named."""

import json

import ml_dtypes
import numpy as np
import pytest

from dqjax.config import ConfigError
from dqjax.data.cache_writer import CacheWriter
from dqjax.data.config import DataConfig
from dqjax.data.loader import open_training_data
from dqjax.data.sample_cache import Field, SampleCache
from dqjax.data.teacher_rows import TeacherRows, teacher_fields, teacher_meta, write_teacher_rows

K, VOCAB = 3, 340


def rows(count):
    texts = ("The answer is " + "1" * (1 + 7 * i % 23) for i in range(count))
    return [{"id": f"r{i}", "prompt": f"What is {i} + 1?", "response": text} for i, text in enumerate(texts)]


def oracle(prefix):
    """What a teacher says behind these tokens: any function of all of them and of their order."""
    rng = np.random.default_rng(np.asarray(prefix, np.uint32))
    p = rng.dirichlet(np.ones(K + 1))
    return rng.choice(VOCAB, K, replace=False), np.log(p[:K]), np.log(p[K])


def write(folder, data, qwen3, *, parts=1, temperature=1.0, dtype="float32", reverse=False):
    """Writes the oracle's rows of all sequences, by `parts` processes, in the plan's order or from its end."""
    sequences = [
        (found.documents.ids[s.values["row"]], s)
        for found in data.row_sets
        for r in range(len(found))
        for s in found.row(r)
    ]
    for part in range(parts):
        fields, meta = teacher_fields(K, VOCAB, dtype), teacher_meta(qwen3, temperature)
        with CacheWriter(folder, fields, meta, part=(part, parts), shard_rows=200) as writer:
            for id, s in (sequences[::-1] if reverse else sequences)[part::parts]:
                ids, logprobs, tail = (np.array(x) for x in zip(*(oracle(s.ids[: t + 1]) for t in range(len(s.ids)))))
                write_teacher_rows(writer, id, s.ids, s.trained, ids, logprobs, tail)
        if part + 1 < parts:
            with pytest.raises(ConfigError, match="writing was not finished"):
                SampleCache(folder)
    return folder


@pytest.fixture
def open_data(write_rows, tmp_path, qwen3):
    def open(*, token_values=None, batch_rows=4, local_rows=None, **values):
        sources = write_rows(rows(50))
        settings = {"sources": sources, "cache_dir": str(tmp_path / "cache"), "workers": 1, "row_length": 96, "seed": 3}
        options = {"batch_rows": batch_rows, "local_rows": local_rows, "token_values": token_values}
        return open_training_data(DataConfig(**settings | values), qwen3, **options)

    return open


def check(batch, atol):
    """Every trained place holds the oracle's row of its own sequence up to there; others hold none."""
    count = 0
    for b, t in np.ndindex(batch.tokens.shape):
        if batch.token_weight[b, t] == 0:
            assert (batch.side["teacher_ids"][b, t] == -1).all()
            continue
        start = t - batch.positions[b, t]
        ids, logprobs, _ = oracle(batch.tokens[b, start : t + 1])
        np.testing.assert_array_equal(batch.side["teacher_ids"][b, t], ids)
        np.testing.assert_allclose(batch.side["teacher_logprobs"][b, t], logprobs, atol=atol)
        count += 1
    return count


@pytest.mark.parametrize("values", [{}, {"too_long": "split", "row_length": 24}, {"train_on_prompt": True}], ids=str)
def test_a_shuffled_resumed_resharded_run_reads_its_own_rows(open_data, qwen3, tmp_path, values):
    folder = write(tmp_path / "teacher", open_data(validation=0.1, **values), qwen3, parts=2, reverse=True)
    reader = TeacherRows(folder, qwen3, 1.0, ("teacher_ids", "teacher_logprobs"))
    data = open_data(token_values=reader, validation=0.1, seed=11, **values)  # other rows, another order
    loader = data.loader
    for _ in range(3):
        assert check(loader.next(), 1e-5)
    state = json.loads(json.dumps(loader.get_state()))
    for host in ([0, 2], [1, 3]):
        other = open_data(token_values=reader, validation=0.1, seed=11, local_rows=host, **values).loader
        other.set_state(state)
        for _ in range(8):
            assert check(other.next(), 1e-5)
    assert sum(check(batch, 1e-5) for batch in data.validation)


def test_rows_of_another_sample_would_be_seen(open_data, qwen3, tmp_path):
    """The check above fails where two samples' rows are swapped, so it can fail."""
    reader = TeacherRows(
        write(tmp_path / "teacher", open_data(), qwen3), qwen3, 1.0, ("teacher_ids", "teacher_logprobs")
    )
    reader._cache._order = np.roll(reader._cache._order, 1)
    with pytest.raises((AssertionError, ValueError)):
        for _ in range(3):
            check(open_data(token_values=reader).loader.next(), 1e-5)


def test_bfloat16_moves_the_head_but_keeps_the_tail(open_data, qwen3, tmp_path):
    folder = write(tmp_path / "teacher", data := open_data(), qwen3, dtype="bfloat16")
    reader = TeacherRows(folder, qwen3, 1.0, ("ids", "logprobs"))
    found = data.loader.stages[0].rows
    for s in found.row(0):
        values = reader(found.documents.ids[s.values["row"]], s.ids, s.trained)
        for t in np.flatnonzero(s.trained):
            _, logprobs, tail = oracle(s.ids[:t])
            stored = np.exp(np.float32(ml_dtypes.bfloat16(tail)))
            np.testing.assert_allclose(np.exp(values["logprobs"][t]).sum(), 1 - stored, atol=1e-6)
            np.testing.assert_allclose(values["logprobs"][t], logprobs, atol=0.02)


def test_a_host_without_rows_has_the_arrays_of_the_others(open_data, qwen3, tmp_path):
    folder = write(tmp_path / "teacher", open_data(validation=0.5), qwen3)
    reader = TeacherRows(folder, qwen3, 1.0, ("ids", "logprobs"))
    for host in ([0], [3]):
        *_, last = open_data(token_values=reader, validation=0.5, local_rows=host).validation
        assert {name: (x.dtype, x.shape[2:]) for name, x in last.side.items() if name in ("ids", "logprobs")} == {
            "ids": (np.int32, (K,)),
            "logprobs": (np.float32, (K,)),
        }


def test_what_cannot_be_read_is_refused_by_name(open_data, qwen3, qwen25, tmp_path):
    folder = write(tmp_path / "teacher", data := open_data(), qwen3)
    names = ("ids", "logprobs")
    with pytest.raises(ConfigError, match="another tokenizer than the student's"):
        TeacherRows(folder, qwen25, 1.0, names)
    with pytest.raises(ConfigError, match="temperature 1.0, here 2.0"):
        TeacherRows(folder, qwen3, 2.0, names)
    with pytest.raises(ConfigError, match="holds a cache already"):
        CacheWriter(folder, {}, {})
    with pytest.raises(ConfigError, match="no cache at"):
        TeacherRows(tmp_path / "nowhere", qwen3, 1.0, names)
    found = data.loader.stages[0].rows
    sample = found.row(0)[0]
    with pytest.raises(ValueError, match="holds nothing for sample 'r99'"):
        TeacherRows(folder, qwen3, 1.0, names)("r99", sample.ids, sample.trained)
    reader = TeacherRows(folder, qwen3, 1.0, names)
    reader.check(found)
    for other in ({"train_on_prompt": True}, {"row_length": 24, "too_long": "split"}):
        with pytest.raises(ConfigError, match=r"does not hold \d+ of \d+ sequences as they are tokenised now"):
            reader.check(open_data(**other).loader.stages[0].rows)
    shard = folder / "shard-000-00001.logprobs.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ConfigError, match=r"shard-000-00001.logprobs.npy has \d+ bytes, expected \d+"):
        TeacherRows(folder, qwen3, 1.0, names)
    shard.write_bytes(whole[:-7] + b"1234567")
    with pytest.raises(ConfigError, match="shard-000-00001.logprobs.npy is not as it was written"):
        TeacherRows(folder, qwen3, 1.0, names)
    shard.unlink()
    with pytest.raises(ConfigError, match="shard-000-00001.logprobs.npy is missing"):
        TeacherRows(folder, qwen3, 1.0, names)


def test_a_row_takes_the_bytes_that_are_stated():
    assert sum(field.bytes for field in teacher_fields(64, 151936, "bfloat16").values()) == 64 * 6 + 2
    assert sum(field.bytes for field in teacher_fields(64, 512, "bfloat16").values()) == 64 * 4 + 2


def test_fields_of_one_sample_agree(tmp_path):
    with pytest.raises(ValueError, match=r"expected rows of shape \(2,\)"):
        CacheWriter(tmp_path / "a", {"x": Field("int32", (2,))}, {}).add("a", np.arange(3), {"x": np.zeros((4, 3))})
    with pytest.raises(ValueError, match="its fields have"):
        CacheWriter(tmp_path / "b", {"x": Field("int32"), "y": Field("int32")}, {}).add(
            "a", np.arange(3), {"x": np.zeros(4), "y": np.zeros(5)}
        )


def test_a_writer_goes_on_where_its_like_was_stopped(tmp_path):
    """Shards of 4 rows; stopped with two whole ones and a sample pending: the rest is added, in the same files."""
    fields, meta = {"x": Field("float32", (2,))}, {"kind": "test", "k": 2}
    rng = np.random.default_rng(0)
    samples = [(f"s{i}", rng.integers(0, 9, 3), rng.normal(size=(3, 2))) for i in range(9)]

    def write(folder, count, stopped=False, **other):
        with CacheWriter(folder, **{"fields": fields, "meta": meta, "shard_rows": 4} | other) as writer:
            held = [writer.holds(id, tokens) for id, tokens, _ in samples]
            for id, tokens, x in samples[:count]:
                writer.add(id, tokens, {"x": x})
            if stopped:
                raise KeyboardInterrupt
        return held

    assert write(tmp_path / "whole", 9) == [False] * 9
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", 5, stopped=True)
    with pytest.raises(ConfigError, match="another command .meta: k 2, here 3."):
        write(tmp_path / "cut", 9, meta=meta | {"k": 3})
    with pytest.raises(ConfigError, match="another command .fields: x "):
        write(tmp_path / "cut", 9, fields={"x": Field("bfloat16", (2,))})
    with pytest.raises(ConfigError, match="unfinished cache of 1 processes, here are 2"):
        write(tmp_path / "cut", 9, part=(1, 2))
    assert write(tmp_path / "cut", 9) == [True] * 4 + [False] * 5
    contents = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "cut")]
    assert contents[0] == contents[1] and len(contents[0]) == 5 * 3 + 1
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "hurt", 5, stopped=True)
    (tmp_path / "hurt" / "shard-000-00001.x.npy").write_bytes(b"half")
    with pytest.raises(ConfigError, match="shard-000-00001.x.npy has 4 bytes"):
        write(tmp_path / "hurt", 9)
