"""Sources yield the same records whatever the container, and name what is wrong with a file or a task."""

import json

import pytest

from dqjax.config import ConfigError
from dqjax.data.config import ColumnsConfig, SourceConfig
from dqjax.data.records import Record
from dqjax.data.sources import Rejected, fingerprint, read_records

ROWS = [{"id": f"r{i}", "prompt": f"{i}+1?", "response": str(i + 1), "level": i} for i in range(5)]


def contents(**source):
    return [
        (r.id, r.messages, r.difficulty)
        for r in read_records(SourceConfig(**source), ColumnsConfig(difficulty="level"))
    ]


def test_jsonl_json_parquet_folder_glob_and_hub_agree(write_rows, tmp_path):
    import pyarrow
    import pyarrow.parquet

    jsonl = contents(path=write_rows(ROWS))
    assert [id for id, *_ in jsonl] == [f"r{i}" for i in range(5)] and jsonl[3][2] == 3.0
    for folder in ("json", "parquet", "both"):
        (tmp_path / folder).mkdir()
    (tmp_path / "json" / "rows.json").write_text(json.dumps(ROWS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "parquet" / "rows.parquet")
    write_rows(ROWS[:2], "both/a.jsonl")
    write_rows(ROWS[2:], "both/b.jsonl")
    assert contents(path=str(tmp_path / "json" / "rows.json")) == jsonl
    (tmp_path / "array.jsonl").write_text(json.dumps(ROWS, indent=2))  # as some publish it, whatever the suffix says
    assert contents(path=str(tmp_path / "array.jsonl")) == jsonl
    assert contents(path=str(tmp_path / "parquet" / "rows.parquet")) == jsonl
    assert contents(path=str(tmp_path / "both")) == jsonl
    assert contents(path=str(tmp_path / "both" / "*.jsonl")) == jsonl
    assert contents(hub=str(tmp_path / "both")) == jsonl


def test_nested_parquet_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    row = {"question": "3+4?", "reasoning": [{"thought": "3+4=7", "solution": "7", "Cognitive_Difficulty": 2}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 2), tmp_path / "o.parquet")
    records = list(read_records(SourceConfig(path=str(tmp_path / "o.parquet"))))
    assert [r.messages[1].reasoning for r in records] == ["3+4=7"] * 2 and records[0].difficulty == 2.0


def test_bad_lines_have_file_line_and_reason(write_rows):
    path = write_rows(
        [ROWS[0], b'{"prompt": "x", "resp', b'{"prompt": "\xff"}', b"", {"prompt": "x", "response": ""}, ROWS[1]]
    )
    items = list(read_records(SourceConfig(path=path)))
    assert [type(i) for i in items] == [Record, Rejected, Rejected, Rejected, Record]
    assert [(i.line, i.reason.split(":")[0]) for i in items if isinstance(i, Rejected)] == [
        (2, "not valid JSON"),
        (3, "not valid UTF-8"),
        (5, "response"),
    ]
    assert all(i.file == path for i in items if isinstance(i, Rejected))


def test_missing_files_and_broken_parquet(write_rows, tmp_path):
    path = write_rows(ROWS)
    with pytest.raises(ConfigError, match="no data file at .*; did you mean .*rows.jsonl"):
        contents(path=path.replace("rows", "row"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ConfigError, match="x.parquet is not a readable parquet file"):
        contents(path=str(tmp_path / "x.parquet"))


def test_fingerprints_change_with_the_rows(write_rows):
    one = SourceConfig(path=write_rows(ROWS))
    before = fingerprint(one)
    assert fingerprint(one) == before
    write_rows(ROWS[:-1])
    assert fingerprint(one) != before
    gcd = SourceConfig(task="gcd", size=3)
    assert fingerprint(gcd) != fingerprint(gcd.model_copy(update={"seed": 1}))


def test_reasoning_gym_tasks():
    source = SourceConfig(task="chain_sum", size=20, seed=5, params={"min_terms": 3, "max_terms": 4})
    records = list(read_records(source))
    again = list(read_records(source))
    assert records == again and len(records) == 20
    assert records[0].id == "chain_sum-5" and records[0].answer.lstrip("-").isdigit()
    for style in ("columns", "running", "answer"):
        worked = list(read_records(source.model_copy(update={"chain": style})))
        assert [r.messages[0] for r in worked] == [r.messages[0] for r in records]
        assert all(r.messages[1].content == r.answer for r in worked)
        assert all((r.messages[1].reasoning is None) == (style == "answer") for r in worked)
    levels = list(read_records(source, ColumnsConfig(difficulty="metadata.num_terms")))
    assert {r.difficulty for r in levels} == {3.0, 4.0}


def test_task_mistakes():
    with pytest.raises(ConfigError, match="no task 'chain_sums'; did you mean chain_sum"):
        list(read_records(SourceConfig(task="chain_sums")))
    with pytest.raises(ConfigError, match="no parameter 'min_term'; did you mean min_terms"):
        list(read_records(SourceConfig(task="chain_sum", params={"min_term": 2})))
    with pytest.raises(ConfigError, match="refuses .*max_terms must be >= min_terms"):
        list(read_records(SourceConfig(task="chain_sum", params={"min_terms": 9})))


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"pip install 'dqjax\[tasks\]'"):
        list(read_records(SourceConfig(task="gcd")))
