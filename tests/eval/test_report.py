"""Figures against hand arithmetic; files and plots."""

import dataclasses
import json

import numpy as np
import pytest

from dqjax.eval.plots import budget_curve, draw_evaluation, pass_at_k_curve
from dqjax.eval.report import as_text, compare, summarise, write_report
from dqjax.eval.run import Graded


def sample(id="p", index=0, correct=True, tokens=10, thinking_tokens=5, **more):
    fields = dict(
        id=id, thinking=True, sample=index, seed=0, correct=correct, score=float(correct), answer="1" if correct else "2",
        reference="1", failed=None, detail="", tokens=tokens, thinking_tokens=thinking_tokens, truncated=False,
        difficulty=None, seconds=0.5, text="",
    )  # fmt: skip
    return Graded(**(fields | more))


@pytest.fixture
def graded():
    """Two problems of four samples: 3 right (10, 20, 30 tokens) and 1 wrong (100); 1 right (50) and 3 wrong (60)."""
    first = [sample("a", i, i < 3, [10, 20, 30, 100][i], difficulty=1.0) for i in range(4)]
    second = [sample("b", i, i == 0, 50 if i == 0 else 60, 40, difficulty=2.0, truncated=i == 3) for i in range(4)]
    return first + second


def test_figures(graded):
    s = summarise(graded, k=(1, 2, 4, 8), max_new_tokens=100, budgets=(20, 50))
    assert (s["problems"], s["samples"]) == (2, 8)
    assert s["accuracy"]["value"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert s["accuracy"]["low"] <= s["accuracy"]["value"] <= s["accuracy"]["high"]
    assert list(s["pass_at_k"]) == ["1", "2", "4"]  # no unbiased pass@8 from 4 samples
    assert s["pass_at_k"]["2"]["value"] == pytest.approx((1 + (1 - 3 / 6)) / 2)
    assert s["majority"]["value"] == 0.5
    assert s["tokens"] == {"mean": 390 / 8, "median": 55.0, "p95": pytest.approx(86.0)}
    assert s["thinking_tokens"]["mean"] == 22.5
    assert s["truncated"] == 1 / 8
    assert s["at_budget"] == [{"tokens": 20, "accuracy": 0.25}, {"tokens": 50, "accuracy": 0.5}]
    assert s["budget_area"] == pytest.approx(((0.9 + 0.8 + 0.7) / 4 + 0.5 / 4) / 2)
    assert s["tokens_per_correct"] == 390 / 4 and s["seconds_per_correct"] == 1.0
    assert s["by_difficulty"]["spearman"] == pytest.approx(1.0)
    assert s["by_difficulty"]["bins"] == [
        {"low": 1.0, "high": 1.0, "problems": 1, "accuracy": 0.75, "tokens": 40.0, "thinking_tokens": 5.0},
        {"low": 2.0, "high": 2.0, "problems": 1, "accuracy": 0.25, "tokens": 57.5, "thinking_tokens": 40.0},
    ]
    json.dumps(s)


def test_the_area_is_that_under_the_curve(graded):
    s = summarise(graded, max_new_tokens=100)
    curve = budget_curve(graded, 100)
    assert curve.y[-1] == s["accuracy"]["value"]
    assert s["budget_area"] == pytest.approx(np.mean(curve.y[:-1]), abs=0.01)


def test_nothing_right_and_nothing_at_all():
    s = summarise([sample("a", 0, False), sample("a", 1, False, failed="math-verify: timeout")], max_new_tokens=64)
    assert s["tokens_per_correct"] is None and s["failed"] == {"math-verify: timeout": 1} and "majority" not in s
    assert "by_difficulty" not in s
    with pytest.raises(ValueError, match="no samples"):
        summarise([], max_new_tokens=10)


def test_many_difficulties_are_cut_at_quintiles():
    graded = [sample(f"p{i}", difficulty=float(i), tokens=100 - i) for i in range(50)]
    bins = summarise(graded, max_new_tokens=100)["by_difficulty"]
    assert [b["problems"] for b in bins["bins"]] == [10] * 5 and bins["spearman"] == pytest.approx(-1.0)
    flat = [dataclasses.replace(g, tokens=5) for g in graded]
    assert summarise(flat, max_new_tokens=100)["by_difficulty"]["spearman"] is None


def test_comparison_is_paired_over_shared_problems(graded):
    fewer = [dataclasses.replace(g, tokens=g.tokens - 5, correct=False) for g in graded if g.id == "a"]
    difference = compare(graded, fewer)
    assert (
        difference["problems"] == 1
        and difference["pass_at_1"]["value"] == pytest.approx(0.75)
        and difference["tokens"] == 5.0
    )
    with pytest.raises(ValueError, match="no problem in common"):
        compare(graded, [sample("z")])


def test_files(graded, tmp_path):
    off = [dataclasses.replace(g, thinking=False) for g in graded]
    summaries = {
        "thinking on": summarise(graded, k=(1, 2), max_new_tokens=100),
        "thinking off": summarise(off, k=(1, 2), max_new_tokens=100),
    }
    about = {"benchmark": "demo", "fingerprint": "abc", "settings": {"samples": 4}, "overlap": "none"}
    report = write_report(
        tmp_path, graded + off, about=about, summaries=summaries, comparisons={"on minus off": compare(graded, off)}
    )
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    text = (tmp_path / "report.md").read_text()
    assert text == as_text(report)
    for expected in (
        "| | thinking on | thinking off |",
        "| accuracy | 50.0% [",
        "pass@2",
        "fingerprint: abc",
        "on minus off: pass@1 +0.0%",
        "Overlap with the training data: none",
    ):
        assert expected in text
    rows = [json.loads(line) for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    assert [(r["id"], r["thinking"], r["n"], r["correct"]) for r in rows] == [
        ("a", True, 4, 3),
        ("b", True, 4, 1),
        ("a", False, 4, 3),
        ("b", False, 4, 1),
    ]
    assert rows[0]["pass_at_k"] == {"1": 0.75, "2": 1.0, "4": 1.0}


def test_plots(graded, tmp_path):
    pytest.importorskip("matplotlib")
    paths = draw_evaluation(tmp_path, {"on": graded, "off": graded}, max_new_tokens=100)
    assert [p.name for p in paths] == ["pass_at_k.png", "accuracy_against_tokens.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    curve = pass_at_k_curve(graded, 0.95)
    assert list(curve.x) == [1, 2, 4] and curve.y[1] == pytest.approx(0.75)
