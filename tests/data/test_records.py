"""Every known form becomes the record that one would write by hand, and what is no row says why."""

import hypothesis
import hypothesis.strategies as st
import pytest

from dqjax.data.config import ColumnsConfig
from dqjax.data.records import (
    BadRow,
    Message,
    Record,
    detect_form,
    normalise_question,
    parse_row,
    question_key,
    split_tags,
)

USER, ANSWER = Message("user", "3+4?"), Message("assistant", "7")
THOUGHT = Message("assistant", "7", "3+4=7")
TAGGED = "<think>\n3+4=7\n</think>\n\n7"
OLD_TAGS = "<|begin_of_thought|>\n\n3+4=7\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n7\n\n<|end_of_solution|>"

FORMS = [
    (
        "messages",
        {"messages": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]},
        (USER, ANSWER),
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "3+4?"},
                {"role": "assistant", "content": "7", "reasoning_content": "3+4=7"},
            ]
        },
        (USER, THOUGHT),
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": TAGGED}]},
        (USER, THOUGHT),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "3+4?"}, {"from": "gpt", "value": OLD_TAGS}]},
        (USER, THOUGHT),
    ),
    (
        "sharegpt",
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "3+4?"}, {"from": "gpt", "value": "7"}]},
        (Message("system", "Be brief."), USER, ANSWER),
    ),
    ("response", {"prompt": "3+4?", "response": TAGGED}, (USER, THOUGHT)),
    ("response", {"prompt": "3+4?", "response": "7", "reasoning": "3+4=7"}, (USER, THOUGHT)),
    ("response", {"prompt": [{"role": "user", "content": "3+4?"}], "completion": "7"}, (USER, ANSWER)),
    ("response", {"question": "3+4?", "response": "3+4=7\n</think>\n\n7"}, (USER, THOUGHT)),  # tag opened by the prompt
    ("instruction", {"instruction": "3+4?", "input": "", "output": "7"}, (USER, ANSWER)),
    ("instruction", {"instruction": "Add.", "input": "3 4", "output": "7"}, (Message("user", "Add.\n\n3 4"), ANSWER)),
    ("answer", {"prompt": "3+4?", "answer": "7"}, (USER,)),
    ("answer", {"question": "3+4?", "answer": 7}, (USER,)),
    ("prompt", {"problem": "3+4?"}, (USER,)),
]


@pytest.mark.parametrize(("form", "row", "messages"), FORMS)
def test_forms(form, row, messages):
    assert detect_form(row) == form
    (record,) = parse_row(row)
    assert record.messages == messages
    assert record.answer == ("7" if form == "answer" else None)
    assert parse_row(record.to_row()) == [record]


def test_omnithought_makes_a_record_a_chain():
    chain = {"thought": "3+4=7", "solution": "7", "teacher": "R1", "Reasoning_Verbosity": 2, "Cognitive_Difficulty": 1}
    row = {
        "question": "3+4?",
        "id": 9,
        "reasoning": [chain, {"full_response": OLD_TAGS}, {"thought": "hm", "solution": ""}],
    }
    assert detect_form(row) == "problems"
    first, second, third = parse_row(row, source="omni")
    assert (first.id, second.id, first.problem, second.problem) == ("9#0", "9#1", "9", "9")
    assert first.messages == second.messages == (USER, THOUGHT)
    assert first.difficulty == 1.0 and second.difficulty is None
    assert first.extra == {"teacher": "R1", "Reasoning_Verbosity": 2, "Cognitive_Difficulty": 1}
    assert isinstance(third, BadRow) and "chain 2" in str(third)
    assert parse_row(first.to_row(), source="omni") == [first]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "3+4?", "chosen": TAGGED, "rejected": "8"},
        {
            "prompt": [{"role": "user", "content": "3+4?"}],
            "chosen": [{"role": "assistant", "content": TAGGED}],
            "rejected": "8",
        },
        {
            "chosen": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": TAGGED}],
            "rejected": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "8"}],
        },
    ],
)
def test_preferences(row):
    assert detect_form(row) == "preference"
    (record,) = parse_row(row | {"beta": 0.2})
    assert (record.messages, record.chosen, record.rejected) == ((USER,), THOUGHT, Message("assistant", "8"))
    assert record.extra == {"beta": 0.2}
    assert parse_row(record.to_row()) == [record]


def test_preference_with_an_earlier_answer_keeps_its_prompt():
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "3+4?"},
    ]
    (record,) = parse_row({"prompt": prompt, "chosen": "7", "rejected": "8"})
    assert len(record.messages) == 3
    assert parse_row(record.to_row()) == [record]


BAD = [
    (["a list"], "expected an object"),
    ({"text": "x"}, "no known form"),
    ({"messages": []}, "empty list"),
    ({"messages": "hello"}, "expected a list of messages, got str"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: expected text, got NoneType"),
    ({"messages": [{"role": "king", "content": "x"}]}, "unknown role 'king'"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "unknown role"),
    ({"messages": ["hello"]}, r"messages\[0\]: expected an object, got str"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "no user turn"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}, "empty"),
    ({"prompt": "x", "response": 3}, "expected text"),
    ({"prompt": "x", "response": ""}, "empty"),
    ({"prompt": "x", "response": "\ud800"}, "lone surrogate"),
    ({"prompt": "x", "response": "<think>on and on"}, "never closed"),
    ({"prompt": "x", "response": "<think>a</think>\n\n"}, "without an answer"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "equal"),
    ({"chosen": "a", "rejected": "b"}, "prompt: missing"),
    ({"question": "x", "reasoning": []}, "list of chains is empty"),
    ({"prompt": "x", "answer": "1", "difficulty": "hard"}, "difficulty: expected a number"),
    ({"prompt": "x", "response": "1", "thinking": "perhaps"}, "thinking: expected true or false"),
    (
        {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "assistant")]},
        "answers nobody",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_say_why(row, reason):
    with pytest.raises(BadRow, match=reason):
        parse_row(row)


def test_columns_are_mapped_also_inside_a_mapping():
    columns = ColumnsConfig(prompt="q", response="a", id="meta.key", difficulty="meta.level")
    meta = {"key": "k1", "level": 2, "source_dataset": "chain_sum"}
    (record,) = parse_row({"q": "3+4?", "a": "7", "meta": meta}, columns=columns)
    extra = {"meta": meta}  # whole: what was not mapped may matter to a grader
    assert record == Record(id="k1", problem="k1", messages=(USER, ANSWER), difficulty=2.0, extra=extra)


def test_an_empty_system_prompt_is_none():
    row = {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "3+4?"},
            {"role": "assistant", "content": "7"},
        ]
    }
    assert parse_row(row)[0].messages == (USER, ANSWER)


def test_ids_without_a_column_are_hashes_of_the_content():
    a, b, c = (parse_row({"prompt": p, "response": "7"}, source=s)[0] for p, s in [("x", "f"), ("x", "g"), ("y", "f")])
    assert a.id == b.id != c.id


def test_tags():
    assert split_tags(TAGGED) == ("3+4=7", "7")
    assert split_tags(OLD_TAGS) == ("3+4=7", "7")
    assert split_tags("no <think> at the start") == (None, "no <think> at the start")
    assert split_tags("<think>\n\n</think>\n\n7") == ("", "7")


def test_questions_are_equal_when_only_their_looks_differ():
    same = ["What is $3 \\, + 4$?", "what  is $3+4$ ?", "What is\n$3 +\t4$?", "WHAT IS $\uff13+4$?"]
    assert len({normalise_question(q) for q in same}) == 1
    assert normalise_question("3 - 4") != normalise_question("3 + 4")
    assert normalise_question("1 2") != normalise_question("12")
    keys = {question_key(parse_row({"prompt": q})[0]) for q in same}
    assert len(keys) == 1 and 0 <= keys.pop() < 2**63


@hypothesis.given(st.text())
def test_normalising_twice_changes_nothing(text):
    once = normalise_question(text)
    assert normalise_question(once) == once


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["user", "assistant", "gpt"])
)
KEYS = st.sampled_from(["role", "from", "content", "value", "reasoning_content", "solution", "thought"])
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=8)
TURNS = st.lists(st.dictionaries(KEYS, SCALARS | JSON), max_size=3)
NAMES = [
    "messages",
    "conversations",
    "prompt",
    "response",
    "answer",
    "chosen",
    "rejected",
    "question",
    "reasoning",
    "system",
    "id",
]


@hypothesis.given(st.dictionaries(st.sampled_from(NAMES), TURNS | JSON))
@hypothesis.settings(max_examples=300)
def test_any_object_is_records_or_a_bad_row(row):
    try:
        records = parse_row(row)
    except BadRow:
        return
    for record in records:
        assert isinstance(record, BadRow) or parse_row(record.to_row())[0].messages == record.messages
