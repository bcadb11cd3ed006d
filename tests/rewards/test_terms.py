"""Format, length, style and model terms, each against hand arithmetic."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from dqjax.config import ConfigError, validate
from dqjax.data.chat import parse_response
from dqjax.data.records import parse_row
from dqjax.rewards.format import FormatGrader
from dqjax.rewards.length import LengthGrader, OverlongConfig, OverlongGrader
from dqjax.rewards.model import ModelConfig, ModelGrader
from dqjax.rewards.types import Completion
from dqjax.rewards.verbosity import DifficultyGrader, Labels, OncePerBatch, StyleConfig, VerbosityGrader, stored_labels


@pytest.mark.parametrize(
    ("text", "options", "fault"),
    [
        ("<think>\na\n</think>\n\nb", {}, ""),
        ("  <think>a</think>b", {}, ""),
        ("a\n</think>\n\nb", {"opened": True}, ""),
        ("b", {"thinking": False}, ""),
        ("b", {}, "0 opening and 0 closing"),
        ("<think>\na", {}, "1 opening and 0 closing"),
        ("<think>a</think>b</think>", {}, "1 opening and 2 closing"),
        ("<think><think>a</think>b", {}, "2 opening and 1 closing"),
        ("<think>a</think><think>b</think>c", {}, "2 opening and 2 closing"),
        ("a</think>b<think>", {}, "before the think block"),
        ("hm <think>a</think>b", {}, "before the think block"),
        ("</think>b<think>", {}, "before the think block"),
        ("<think>\n\n</think>\n\nb", {}, "empty think block"),
        ("<think>a</think>\n\n", {}, "no answer"),
        ("<think>a</think>b", {"truncated": True}, "cut at the token limit"),
        ("<think>a</think>b", {"opened": True}, "2 opening"),
        ("<think>a</think>b", {"thinking": False}, "none was asked for"),
        ("a</think>b", {"thinking": False}, "none was asked for"),
        ("", {"thinking": False}, "no answer"),
    ],
)
def test_format(complete, text, options, fault):
    (grade,) = FormatGrader()([complete(text, **options)])
    assert grade.failed is None and grade.score == float(not fault)
    assert fault in grade.detail and bool(grade.detail) == bool(fault)


@pytest.mark.parametrize(
    ("tokens", "score"),
    [(0, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1.0), (101, -1.0), (10**6, -1.0)],
)
def test_overlong(complete, tokens, score):
    (grade,) = OverlongGrader(OverlongConfig(limit=100, buffer=20))([complete("x", tokens=tokens)])
    assert grade.score == pytest.approx(score)


def test_overlong_of_a_cut_sample_is_full(complete):
    assert (
        OverlongGrader(OverlongConfig(limit=100, buffer=20))([complete("x", tokens=10, truncated=True)])[0].score
        == -1.0
    )


def test_overlong_config():
    with pytest.raises(ConfigError, match="buffer"):
        validate(OverlongConfig, {"limit": 10, "buffer": 11}, where="test")


def test_length_is_relative_to_the_group(complete):
    batch = [complete("x", id=i, tokens=t) for i, t in [("a", 10), ("b", 7), ("a", 20), ("a", 15), ("b", 7), ("c", 3)]]
    assert [g.score for g in LengthGrader()(batch)] == [0.5, 0.0, -0.5, 0.0, 0.0, 0.0]


@hypothesis.given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_length_is_bounded_and_falls_with_tokens(complete, lengths):
    scores = [g.score for g in LengthGrader()([complete("x", tokens=t) for t in lengths])]
    assert all(-0.5 <= s <= 0.5 for s in scores)
    assert all(
        a >= b
        for _, a, _, b in ((m, a, n, b) for m, a in zip(lengths, scores) for n, b in zip(lengths, scores) if m <= n)
    )


def scorer_of(*labels):
    return lambda completions: [Labels(*label) for label in labels]


def test_verbosity_and_difficulty(complete):
    batch = [complete("x"), complete("y"), complete("z")]
    scorer = scorer_of((4.0, 9.0), (0.0, 4.0), (None, None))
    config = StyleConfig(verbosity=4.0, difficulty=4.0)
    verbosity = VerbosityGrader(config, scorer)(batch)
    assert [g.score for g in verbosity] == pytest.approx([1.0, 1 - 4 / 9, 0.0])
    assert [g.failed for g in verbosity] == [None, None, "no RV label"]
    difficulty = DifficultyGrader(config, scorer)(batch)
    assert [g.score for g in difficulty] == pytest.approx([1 - 5 / 9, 1.0, 0.0])
    assert difficulty[2].failed == "no CD label"


def test_the_verbosity_target_rises_with_difficulty(complete):
    config = StyleConfig(verbosity_at_0=1.0, verbosity_at_9=8.0)
    assert [config.verbosity_for(d) for d in (0.0, 4.5, 9.0, 20.0, None)] == [1.0, 4.5, 8.0, 8.0, None]
    grades = VerbosityGrader(config, scorer_of((4.5, 0), (4.5, 0)))([complete("x", difficulty=4.5), complete("x")])
    assert grades[0].score == 1.0 and "not known" in grades[1].failed


def test_stored_labels_are_read_and_odd_ones_are_missing(complete):
    rows = [(3, 5.5), (0, 0), ("7", 4), (10, -1), (True, None)]
    batch = [complete("x", Reasoning_Verbosity=rv, Cognitive_Difficulty=cd) for rv, cd in rows]
    expected = [(3.0, 5.5), (0.0, 0.0), (None, 4.0), (None, None), (None, None)]
    assert [tuple(label) for label in stored_labels(batch)] == expected
    assert stored_labels([complete("x", difficulty=3.0)]) == [(None, None)]
    chain = {"thought": "a", "solution": "b", "Reasoning_Verbosity": 2, "Cognitive_Difficulty": 7}
    problem = parse_row({"question": "q", "reasoning": [chain]})[0]
    assert stored_labels([Completion(problem, "x", parse_response("x"), 1)]) == [(2.0, 7.0)]


def test_a_scorer_is_asked_once_a_batch(complete):
    asked = []

    def scorer(completions):
        asked.append(len(completions))
        return [Labels(1.0, 1.0)] * len(completions)

    once, batch = OncePerBatch(scorer), [complete("x")]
    once(batch), once(batch)
    assert asked == [1]
    once([*batch, *batch])
    assert asked == [1, 2]
    with pytest.raises(ValueError, match="0 labels for 1"):
        VerbosityGrader(StyleConfig(), lambda c: [])(batch)


@pytest.mark.parametrize(
    ("score", "reward"),
    [(0.0, 0.5), (2.0, 1 / (1 + math.exp(-2))), (-2.0, 1 / (1 + math.exp(2))), (1e9, 1.0), (-1e9, 0.0)],
)
def test_model_scores_are_squashed(complete, score, reward):
    assert ModelGrader(ModelConfig(), lambda c: [score])([complete("x")])[0].score == pytest.approx(reward)
    assert ModelGrader(ModelConfig(squash="none"), lambda c: [score])([complete("x")])[0].score == score


def test_model_failures(complete):
    grades = ModelGrader(ModelConfig(), lambda c: [math.nan, math.inf])([complete("x")] * 2)
    assert all(g.failed and g.score == 0.0 for g in grades)
    with pytest.raises(ValueError, match="1 scores for 2"):
        ModelGrader(ModelConfig(), lambda c: [1.0])([complete("x")] * 2)
