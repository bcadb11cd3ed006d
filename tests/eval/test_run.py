"""Sampling, grading, records, and going on after an interruption."""

import json

import pytest

from dqjax.config import ConfigError
from dqjax.eval import evaluate
from dqjax.eval.run import claim_folder, read_records
from dqjax.eval.samplers import sample_seed


def right_below(n):
    return lambda request: str(request.problem.answer) if int(request.problem.answer) < n else "nothing"


def test_every_sample_is_graded_in_order(problems, scripted):
    sampler = scripted(right_below(2))
    graded = evaluate(sampler, problems(3), samples=2, modes=(True, False))
    assert [g.key for g in graded] == [(f"p{i}", mode, j) for mode in (True, False) for i in range(3) for j in range(2)]
    assert [g.correct for g in graded[:6]] == [True, True, True, True, False, False]
    assert graded[0].reference == "0" and graded[0].answer == "0" and graded[0].tokens == 10 and graded[1].tokens == 11
    assert graded[0].thinking_tokens == 5 and graded[6].thinking_tokens == 0
    assert [r.key for r in sampler.asked] == [g.key for g in graded]


def test_seeds_belong_to_the_sample(problems, scripted):
    a, b = (evaluate(scripted(right_below(9)), problems(n), samples=2, seed=3) for n in (3, 5))
    assert [g.seed for g in a] == [g.seed for g in b[:6]] and len({g.seed for g in b}) == 10
    assert a[0].seed == sample_seed(3, "p0", 0) != sample_seed(4, "p0", 0)
    assert 0 <= a[0].seed < 2**31


def test_resumes_where_it_stopped(problems, scripted, tmp_path):
    """Killed after any number of samples, even in the middle of a line: the end is that of a run without the kill."""
    whole = tmp_path / "whole.jsonl"
    expected = evaluate(scripted(right_below(4)), problems(6), samples=3, records=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 18
    for kept, torn in [(0, b""), (7, b""), (7, lines[7][:20]), (18, b""), (17, lines[17][:-1])]:
        path = tmp_path / "part.jsonl"
        path.write_bytes(b"".join(lines[:kept]) + torn)
        sampler = scripted(right_below(4))
        graded = evaluate(sampler, problems(6), samples=3, records=path)
        assert len(sampler.asked) == 18 - kept
        assert [(g.key, g.correct, g.text, g.seed) for g in graded] == [
            (g.key, g.correct, g.text, g.seed) for g in expected
        ]
        assert len(read_records(path)) == 18


def test_an_exception_keeps_what_was_graded(problems, scripted, tmp_path):
    def answer(request):
        if request.problem.id == "p70":
            raise ConnectionError("gone")
        return "1"

    path = tmp_path / "records.jsonl"
    with pytest.raises(ConnectionError):
        evaluate(scripted(answer), problems(80), records=path)
    assert len(read_records(path)) == 64
    sampler = scripted(lambda request: "1")
    assert len(evaluate(sampler, problems(80), records=path)) == 80 and len(sampler.asked) == 16


def test_more_samples_extend_a_run(problems, scripted, tmp_path):
    path = tmp_path / "records.jsonl"
    evaluate(scripted(right_below(9)), problems(3), samples=1, records=path)
    sampler = scripted(right_below(9))
    assert len(evaluate(sampler, problems(4), samples=2, records=path)) == 8
    assert len(sampler.asked) == 5


def test_a_grader_of_ones_own(problems, scripted):
    from dqjax.rewards.types import Grade, could_not

    def grader(completions):
        return [Grade(1.0) if c.problem.id == "p0" else could_not("no") for c in completions]

    graded = evaluate(scripted(right_below(9)), problems(2), grader=grader)
    assert [(g.correct, g.failed) for g in graded] == [(True, None), (False, "no")]


def test_refusals(problems, scripted, tmp_path):
    with pytest.raises(ConfigError, match="two problems have the id 'p0'"):
        evaluate(scripted(right_below(9)), [*problems(2), *problems(1)])
    path = tmp_path / "records.jsonl"
    for line in ('{"id": 1}\n', "not json\n"):
        path.write_text(line)
        with pytest.raises(ConfigError, match=r"records.jsonl:1: not a record"):
            evaluate(scripted(right_below(9)), problems(1), records=path)


def test_a_folder_belongs_to_its_settings(tmp_path):
    settings = {"benchmark": "x", "samples": 1, "temperature": 0.6}
    out = claim_folder(tmp_path / "out", settings)
    assert claim_folder(out, settings | {"samples": 4}) == out
    assert json.loads((out / "settings.json").read_text())["samples"] == 4
    with pytest.raises(ConfigError, match=r"temperature was 0.6, is 1.0"):
        claim_folder(out, settings | {"temperature": 1.0})
    with pytest.raises(ConfigError, match=r"top_k was None, is 3"):
        claim_folder(out, settings | {"top_k": 3})
    (out / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        claim_folder(out, settings)
