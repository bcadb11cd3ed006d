"""What replies say: chains and solutions in every style, and integers that are stated or missing."""

import hypothesis
import hypothesis.strategies as st
import pytest

from dqjax.config import ConfigError
from dqjax.data.prompt import load_prompt
from dqjax.data.replies import Unusable, read_integer, read_word, split_reply
from dqjax.data.teacher import Reply


def reply(text, reasoning=None, finish="stop"):
    return Reply(text, reasoning, finish, 1, 1, "m", 0.0)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (reply("<think>\nadd\n</think>\n\n7"), ("add", "7")),
        (reply("add</think>7"), ("add", "7")),
        (
            reply("<|begin_of_thought|>\nadd\n<|end_of_thought|>\n\n<|begin_of_solution|>\n7\n<|end_of_solution|>"),
            ("add", "7"),
        ),
        (reply("7", "add\n"), ("add", "7")),
        (reply("It is 7."), (None, "It is 7.")),
        (reply("<think>\n\n</think>\n\n7"), (None, "7")),
    ],
)
def test_chain_and_solution_in_every_style(said, expected):
    assert split_reply(said) == expected


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (reply("<think>\nadd", finish="length"), "cut at max_tokens"),
        (reply("<think>\nadd and add"), "never closes"),
        (reply("<|begin_of_thought|>add"), "never closes"),
        (reply("<think>\nadd\n</think>\n\n"), "without a solution"),
        (reply(" ", "add"), "without a solution"),
    ],
)
def test_unusable_chains(said, reason):
    with pytest.raises(Unusable, match=reason):
        split_reply(said)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), (" 7\n", 7), ("**7**", 7), ("7.", 7), ("0", 0), ("9", 9), ("Score: 4", 4), ("rating is 5.", 5),
        ("The chain is long.\nVerbosity: **6**", 6), ("\\boxed{3}", 3), ('{"score": 8}', 8), ('```json\n{"difficulty": "2"}\n```', 2),
        ("7/9", 7), ("Level: 3/9", 3), ("`5`", 5),
        # missing, never a score
        ("", None), ("10", None), ("-3", None), ("5.5", None), ("seven", None), ("n/a", None), ("7 or 8", None), ("7-8", None),
        ("I count 3 steps, so it is concise.", None), ("Score: high", None), ("Score: 11", None), ("99999999999", None),
        ("\\boxed{3} or \\boxed{4}", None), ('{"score": 12}', None), ("²", None), ("٣", None), ("7/10", None), ("NaN", None),
        ("<think>\n5", None), ("1e0", None), ("0x5", None), ("five (5)", None),
    ],
)  # fmt: skip
def test_integers_are_stated_or_missing(text, value):
    assert read_integer(text) == value


@hypothesis.given(st.text(max_size=60))
def test_nothing_but_a_statement_makes_a_score(text):
    value = read_integer(text)
    assert value is None or (0 <= value <= 9 and str(value) in text)


def test_words():
    assert [read_word(t, ("easy", "hard")) for t in ("Easy.", "rating: hard", "**easy**", "not easy", "", "easy or hard")] == [
        "easy", "hard", "easy", None, None, None,
    ]  # fmt: skip


def test_prompts_are_versioned_files(tmp_path):
    prompt = load_prompt("annotate_verbosity")
    assert prompt.label == "annotate_verbosity@1"
    system, user = prompt(question="{{chain}} \\1", chain="$x$")
    assert system.role == "system" and "{{chain}} \\1" in user.content and "$x$" in user.content
    own = tmp_path / "mine.txt"
    own.write_text("version: 3b\n# user\nSay {{word}}\n")
    assert load_prompt(str(own)).label == "mine@3b" and load_prompt(str(own)).system is None
    with pytest.raises(ConfigError, match="has a field {{word}}; known here: question"):
        load_prompt(str(own))(question="x")
    own.write_text("Say it")
    with pytest.raises(ConfigError, match="expected the lines"):
        load_prompt(str(own))
    with pytest.raises(ConfigError, match="no prompt file"):
        load_prompt(str(tmp_path / "none.txt"))
