"""The data section: short forms, and mistakes that are refused by name."""

import pytest

from dqjax.config import ConfigError, dump, load, validate
from dqjax.data.config import DataConfig


def test_short_forms(tmp_path):
    config = DataConfig(sources="train.jsonl", thinking="off")
    assert config.sources[0].path == "train.jsonl" and config.sources[0].label == "train"
    assert DataConfig(sources=["org/name"]).sources[0].hub == "org/name"
    assert DataConfig(sources={"task": "gcd", "params": {"max_value": 9}}).sources[0].label == "gcd"
    assert validate(DataConfig, {"sources": "a.jsonl", "thinking": True}, where="x").thinking == "on"  # YAML's bare on
    (tmp_path / "c.yaml").write_text(dump(config))
    assert load(DataConfig, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "sources: this key is required"),
        ({"sources": []}, "sources"),
        ({"sources": [{"path": "a.jsonl", "task": "gcd"}]}, "one of path, hub, task; got path and task"),
        ({"sources": [{"name": "x"}]}, "one of path, hub, task; got none"),
        ({"sources": [{"task": "gcd", "chain": "columns"}]}, "chain: worked chains exist for the task chain_sum"),
        ({"sources": ["a/x.jsonl", "b/x.jsonl"]}, "two are called 'x'"),
        ({"sources": [{"path": "a.jsonl", "share": 0.5}, "b.jsonl"]}, "every source a share, or none"),
        ({"sources": [{"path": "a.jsonl", "share": 0.5}]}, "add up to 1, got 0.5"),
        ({"sources": "a.jsonl", "row_lenght": 9}, "row_lenght: unknown key; did you mean row_length"),
        ({"sources": "a.jsonl", "row_length": "9"}, "row_length: expected a whole number"),
        ({"sources": "a.jsonl", "too_long": "cut"}, "'cut' is not among the choices"),
        ({"sources": "a.jsonl", "validation": 1.5}, "a share lies between 0 and 1"),
        ({"sources": "a.jsonl", "curriculum": {"stages": []}}, "curriculum.stages"),
        (
            {"sources": "a.jsonl", "curriculum": {"stages": [{"at_least": 3, "below": 2}]}},
            "at_least: 3.0 must lie under",
        ),
    ],
)
def test_mistakes_are_named(values, said):
    with pytest.raises(ConfigError) as caught:
        validate(DataConfig, values, where="config")
    assert said in str(caught.value)
