"""The cache of tokenised documents: equal whoever writes it, whole whoever is killed, new when anything changes."""

import json
import logging
import multiprocessing
import os
import pathlib
import signal

import numpy as np
import pytest

import dqjax.data.documents as documents_module
import dqjax.data.tokenise as tokenise_module
from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat
from dqjax.data.config import DataConfig
from dqjax.data.documents import load_documents
from dqjax.data.records import Message, Record
from dqjax.data.tokenise import turn_mode
from dqjax.data.tokenizer import template

ROWS = [
    {
        "id": f"r{i}",
        "prompt": f"What is {i} + 1?",
        "response": f"<think>\n{i}+1={i + 1}\n</think>\n\n{i + 1}",
        "difficulty": i,
    }
    for i in range(40)
]


def config(path, tmp_path, **values):
    return DataConfig(**{"sources": path, "cache_dir": str(tmp_path / "cache"), "workers": 1} | values)


def load(config, chat):
    return load_documents(config, config.sources, chat)


def same(a, b):
    assert list(a.ids) == list(b.ids) and a.sources == b.sources
    for name in ("lengths", "answer_start", "difficulty", "question", "source"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for d in range(len(a)):
        np.testing.assert_array_equal(a.ids_of(d), b.ids_of(d))


def test_documents_are_the_rendered_turns(write_rows, tmp_path, chat3):
    documents = load(config(write_rows(ROWS), tmp_path), chat3)
    assert len(documents) == 40 and documents.ids[7] == "r7" and documents.difficulty[7] == 7
    text = chat3.tokenizer.decode(documents.ids_of(7))
    assert (
        text
        == "<|im_start|>user\nWhat is 7 + 1?<|im_end|>\n<|im_start|>assistant\n<think>\n7+1=8\n</think>\n\n8<|im_end|>"
    )
    assert chat3.tokenizer.decode(documents.prompt(7)).endswith("assistant\n")
    assert len(set(documents.question.tolist())) == 40


def test_the_second_time_nothing_is_tokenised(write_rows, tmp_path, chat3, monkeypatch):
    settings = config(write_rows(ROWS), tmp_path)
    first = load(settings, chat3)
    monkeypatch.setattr(documents_module, "_write_entry", None)
    same(load(settings, chat3), first)


def test_whatever_changes_the_documents_changes_the_entry(write_rows, tmp_path, qwen3):
    def entries():
        return {p.name for p in (tmp_path / "cache").iterdir()}

    path, seen = write_rows(ROWS), set()
    chat = ChatFormat.of(qwen3)
    for values in ({}, {"thinking": "off"}, {"no_think_share": 0.5}, {"no_think_share": 0.5, "seed": 1}):
        load(config(path, tmp_path, **values), chat)
        assert len(entries()) == len(seen) + 1
        seen = entries()
    load(config(path, tmp_path, row_length=99, seed=5, too_long="split"), chat)  # packing's business, not the entry's
    assert entries() == seen
    qwen3.chat_template = template("think")
    load(config(path, tmp_path), ChatFormat.of(qwen3))
    write_rows(ROWS[1:])
    load(config(path, tmp_path), chat)
    assert len(entries()) == len(seen) + 2


def test_processes_write_what_one_process_writes(write_rows, tmp_path, chat3, monkeypatch):
    rows = [*ROWS, {"prompt": "no answer"}, *ROWS[:9], {"text": "?"}]
    path = write_rows(rows)
    monkeypatch.setattr(tokenise_module, "_CHUNK", 8)
    settings = {"max_bad_share": 0.5}
    alone = load(config(path, tmp_path, **settings), chat3)
    monkeypatch.setattr(tokenise_module, "_POOL_FROM", 8)
    spread = load(config(path, tmp_path, cache_dir=str(tmp_path / "other"), workers=2, **settings), chat3)
    same(alone, spread)
    entries = [next(p for p in (tmp_path / n).iterdir()) for n in ("cache", "other")]
    assert len({(e / "rejected.jsonl").read_text() for e in entries}) == 1


def test_bad_rows_are_put_aside_and_too_many_stop_the_run(write_rows, tmp_path, chat3, caplog):
    path = write_rows([*ROWS, b"{broken", {"prompt": "no answer"}, {"prompt": "x", "response": "1<|im_end|>2"}])
    aside = tmp_path / "q" / "bad.jsonl"
    for _ in range(2):  # the second time from the cache
        aside.unlink(missing_ok=True)
        with caplog.at_level(logging.WARNING):
            documents = load(config(path, tmp_path, max_bad_share=0.1, quarantine=str(aside)), chat3)
        assert len(documents) == 40 and "3 of 43 rows are unusable" in caplog.text
        rows = [json.loads(line) for line in aside.read_text().splitlines()]
        assert [(r["line"], r["reason"].split(":")[0]) for r in rows] == [
            (41, "not valid JSON"),
            (42, "no answer to train on"),
            (43, "a stop token inside the answer"),
        ]
    with pytest.raises(ConfigError, match="3 of 43 rows are unusable.*More than data.max_bad_share = 0.05"):
        load(config(path, tmp_path, max_bad_share=0.05), chat3)
    with pytest.raises(ConfigError, match="no document"):
        load(config(write_rows([b""], "none.jsonl"), tmp_path), chat3)


def test_doubled_ids_are_said(write_rows, tmp_path, chat3, caplog):
    load(config(write_rows([*ROWS, ROWS[0]]), tmp_path), chat3)
    assert "1 of 41 documents share their id" in caplog.text


def _write_and_die(settings, folder, after):
    import transformers

    chat, written = ChatFormat.of(transformers.AutoTokenizer.from_pretrained(folder)), []
    original = np.save

    def save(*args, **kwargs):
        written.append(None)
        if len(written) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    np.save = save
    load(settings, chat)


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_writer_leaves_no_entry(write_rows, tmp_path, qwen3_folder, chat3, after):
    settings = config(write_rows(ROWS), tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(settings, qwen3_folder, after))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = list((tmp_path / "cache").iterdir())
    assert left and all(p.name.startswith(".making-") for p in left)
    assert len(load(settings, chat3)) == 40
    os.utime(left[0], (0, 0))
    load(settings.model_copy(update={"thinking": "off"}), chat3)
    assert not left[0].exists()  # swept up once it is old


@pytest.mark.parametrize("name", ["tokens.npy", "lengths.npy", "ids.json", "meta.json", "rejected.jsonl"])
def test_a_damaged_entry_is_written_again(write_rows, tmp_path, chat3, caplog, name):
    settings = config(write_rows([*ROWS, {"text": "?"}]), tmp_path, max_bad_share=0.5)
    first = load(settings, chat3)
    (entry,) = (tmp_path / "cache").iterdir()
    whole = (entry / name).read_bytes()
    for damage in (whole[: len(whole) // 2], None):
        (entry / name).unlink()
        if damage is not None:
            (entry / name).write_bytes(damage)
        same(load(settings, chat3), first)
        assert "damaged" in caplog.text
        caplog.clear()
        assert (entry / name).read_bytes() == whole


def test_two_writers_of_one_entry(write_rows, tmp_path, chat3, monkeypatch):
    settings = config(write_rows(ROWS), tmp_path)
    rename = pathlib.Path.rename

    def late(self, target):  # the other writer finishes just before
        if not target.exists():
            __import__("shutil").copytree(self, target)
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", late)
    assert len(load(settings, chat3)) == 40
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_turn_modes():
    def mode(id="a", thinking=None, **values):
        record = Record(id=id, problem=id, messages=(Message("user", "x"),), thinking=thinking)
        return turn_mode(record, DataConfig(sources="x.jsonl", **values))

    assert [mode(thinking=t) for t in (None, True, False)] == ["turn", "on", "off"]
    for config in (DataConfig(sources="x.jsonl", thinking=t) for t in ("on", "off")):
        assert turn_mode(Record(id="a", problem="a", messages=()), config) == config.thinking
    config = DataConfig(sources="x.jsonl", thinking="on", no_think_share=0.3)
    drawn = [turn_mode(Record(id=str(i), problem="", messages=()), config) for i in range(2000)]
    assert 0.25 < drawn.count("off") / 2000 < 0.35 and drawn.count("on") + drawn.count("off") == 2000
