"""Training ids are the served prompt's ids and then what the model should sample; oracle: apply_chat_template."""

import os
import random

import hypothesis
import hypothesis.strategies as st
import pytest
import transformers

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat, Response, parse_response
from dqjax.data.records import BadRow, Message, Record
from dqjax.data.tokenizer import template

DEFAULT = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
ONE = (Message("user", "3+4?"), Message("assistant", "7", "3+4=7"))
MANY = (Message("system", "Be brief."), *ONE, Message("user", "Less 2?"), Message("assistant", "5", "7-2=5"))
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
ASK1, ASK2 = "<|im_start|>user\n3+4?<|im_end|>\n", "<|im_start|>user\nLess 2?<|im_end|>\n"
SAID1, START = "<|im_start|>assistant\n7<|im_end|>\n", "<|im_start|>assistant\n"
SHUT = "<think>\n\n</think>\n\n"

# template, thinking, messages, [(prompt, answer) for each assistant turn]. Qwen3's own template agrees (see
# test_qwen3s_own_template_renders_the_same); Qwen2.5's is the published one without its tools.
GOLDEN = [
    ("qwen3", "on", ONE, [(ASK1 + START, "<think>\n3+4=7\n</think>\n\n7")]),
    ("qwen3", "off", ONE, [(ASK1 + START + SHUT, "7")]),
    (
        "qwen3",
        "on",
        MANY,
        [
            (BRIEF + ASK1 + START, "<think>\n3+4=7\n</think>\n\n7"),
            (BRIEF + ASK1 + SAID1 + ASK2 + START, "<think>\n7-2=5\n</think>\n\n5"),
        ],
    ),
    ("qwen3", "off", MANY, [(BRIEF + ASK1 + START + SHUT, "7"), (BRIEF + ASK1 + SAID1 + ASK2 + START + SHUT, "5")]),
    ("qwen25", "on", ONE, [(DEFAULT + ASK1 + START, "<think>\n3+4=7\n</think>\n\n7")]),
    ("qwen25", "off", ONE, [(DEFAULT + ASK1 + START, "7")]),
    (
        "qwen25",
        "on",
        MANY,
        [
            (BRIEF + ASK1 + START, "<think>\n3+4=7\n</think>\n\n7"),
            (BRIEF + ASK1 + SAID1 + ASK2 + START, "<think>\n7-2=5\n</think>\n\n5"),
        ],
    ),
    ("qwen25", "off", MANY, [(BRIEF + ASK1 + START, "7"), (BRIEF + ASK1 + SAID1 + ASK2 + START, "5")]),
    ("think", "on", ONE, [(DEFAULT + ASK1 + START, "<think>\n3+4=7\n</think>\n\n7")]),
    ("think", "off", ONE, [(DEFAULT + ASK1 + START + SHUT, "7")]),
    ("think", "off", MANY, [(BRIEF + ASK1 + START + SHUT, "7"), (BRIEF + ASK1 + SAID1 + ASK2 + START + SHUT, "5")]),
]


def tokenizer_for(name, qwen3, qwen25):
    tokenizer = qwen3 if name == "qwen3" else qwen25
    if name == "think":
        tokenizer.chat_template = template("think")
    return tokenizer


def record(messages, id="r"):
    return Record(id=id, problem=id, messages=tuple(messages))


@pytest.mark.parametrize(("name", "mode", "messages", "expected"), GOLDEN)
def test_training_ids_are_the_served_prompt_and_the_sampled_ids(name, mode, messages, expected, qwen3, qwen25):
    tokenizer = tokenizer_for(name, qwen3, qwen25)
    chat = ChatFormat.of(tokenizer)
    (turns,) = chat.turns([record(messages)], [mode])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.end_id == end and end in chat.stop_ids
    assert [t.id for t in turns] == (["r"] if len(turns) == 1 else ["r/2", "r/4"])
    places = [i for i, m in enumerate(messages) if m.role == "assistant"]
    assert len(turns) == len(places) == len(expected)
    for turn, place, (prompt, answer) in zip(turns, places, expected):
        served = tokenizer.apply_chat_template(
            [m.to_dict() for m in messages[:place]],
            add_generation_prompt=True,
            enable_thinking=mode == "on",
            return_dict=False,
        )
        sampled = tokenizer(answer, add_special_tokens=False)["input_ids"] + [end]
        assert turn.ids.tolist() == served + sampled
        assert turn.answer_start == len(served)
        assert tokenizer.decode(served) == prompt
        assert chat.prompt_ids(messages[:place], thinking=mode == "on") == served
        parsed = chat.parse(tokenizer.decode(sampled[:-1]), thinking=mode == "on")
        assert parsed == Response(messages[place].reasoning if mode == "on" else None, messages[place].content, True)


word = st.text(st.sampled_from("ab 1+=\n.?é世"), min_size=1, max_size=12).filter(
    lambda t: t.strip() and not t[0].isspace()
)


@hypothesis.given(
    st.lists(st.tuples(word, st.none() | word, word), min_size=1, max_size=3),
    st.none() | word,
    st.sampled_from(["qwen3", "qwen25", "think"]),
    st.booleans(),
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_the_last_turn_is_the_whole_conversation_as_the_template_renders_it(
    qwen3, qwen25, said, system, name, thinking
):
    tokenizer = tokenizer_for(name, qwen3, qwen25)
    messages = [Message("system", system)] if system else []
    for question, reasoning, answer in said:
        messages += [Message("user", question), Message("assistant", answer, reasoning and reasoning.strip("\n"))]
    if thinking and messages[-1].reasoning is None:
        messages[-1] = Message("assistant", messages[-1].content, "so")
    (turns,) = ChatFormat.of(tokenizer).turns([record(messages)], ["turn" if thinking else "off"])
    last = messages[-1]
    inline = f"<think>\n{last.reasoning}\n</think>\n\n{last.content}" if thinking else last.content
    rows = [m.to_dict() for m in messages[:-1]] + [{"role": "assistant", "content": inline}]
    whole = tokenizer.apply_chat_template(rows, enable_thinking=thinking, return_dict=False)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert turns[-1].ids.tolist() + newline == whole


def test_modes(chat3):
    mixed = record((ONE[0], Message("assistant", "7"), Message("user", "Less 2?"), MANY[-1]))
    on, off, turn = chat3.turns([mixed] * 3, ["on", "off", "turn"])
    assert [t.id for t in on] == ["r"] and on[0].thinking
    assert [t.thinking for t in off] == [False, False]
    assert [t.thinking for t in turn] == [False, True]
    (none,) = chat3.turns([record((ONE[0], Message("assistant", "7")))], ["on"])
    assert isinstance(none, BadRow) and "thinking is on" in str(none)


def test_records_that_cannot_be_trained(chat3):
    stray = record((ONE[0], Message("assistant", "7<|im_end|>8")))
    bare = record(ONE[:1])
    bad, empty, fine = chat3.turns([stray, bare, record(ONE)], ["off"] * 3)
    assert "stop token" in str(bad) and "no answer" in str(empty) and len(fine) == 1


OPENS = template("qwen3").replace(
    "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}\n"
    "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}",
    "{{- '<|im_start|>assistant\\n<think>\\n' }}",
)


def test_a_template_that_opens_the_block_keeps_the_tag_in_the_prompt(qwen3):
    qwen3.chat_template = OPENS
    chat = ChatFormat.of(qwen3)
    assert chat.opens_block and chat.always_opens and not chat.has_switch
    ((turn,),) = chat.turns([record(ONE)], ["on"])
    assert qwen3.decode(turn.ids[: turn.answer_start]).endswith("assistant\n<think>\n")
    answer = qwen3.decode(turn.ids[turn.answer_start : -1])
    assert answer == "3+4=7\n</think>\n\n7"
    assert chat.parse(answer, thinking=True) == Response("3+4=7", "7", True)
    with pytest.raises(ValueError, match="always opens"):
        chat.prompt_ids(ONE[:1], thinking=False)
    (bad,) = chat.turns([record(ONE)], ["off"])
    assert "always opens" in str(bad)


# DeepSeek-R1's template drops the chain of the last answer too: what it renders is not what was sampled.
DROPS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NO_END = template("qwen3").replace("{{- '<|im_end|>\\n' }}\n    {%- else", "{{- '\\n' }}\n    {%- else")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no chat template; set model.chat_template: think"),
        (DROPS, "does not render a conversation as prompt [+] answer"),
        (NO_END, "one stop token"),
    ],
)
def test_templates_that_are_refused(qwen3, text, reason):
    qwen3.chat_template = text
    with pytest.raises(ConfigError, match=reason):
        ChatFormat.of(qwen3)


def test_a_prompt_that_is_no_token_prefix_is_refused(qwen3):
    # " " and "The" of the answer become one token: the served prompt ends in a token that training would never show.
    qwen3.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"
    )
    with pytest.raises(ConfigError, match="thinking off, the prompt of this chat template is not a token prefix"):
        ChatFormat.of(qwen3)


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("7", False, Response(None, "7", True)),
        ("<think>\na\n</think>\n\n7", False, Response("a", "7", True)),
        ("a\n</think>\n\n7", True, Response("a", "7", True)),
        ("<think>\na\n</think>\n\n7", True, Response("a", "7", True)),
        ("<think>\nround and round", False, Response("round and round", "", False)),
        ("round and round", True, Response("round and round", "", False)),
        ("7 </think> 8", False, Response(None, "7 </think> 8", True)),
        ("<think>a</think>b</think>c", False, Response("a", "b</think>c", True)),
    ],
)
def test_parse_response(text, opened, expected):
    assert parse_response(text, opened=opened) == expected


@pytest.mark.skipif(
    "DQJAX_QWEN3_TOKENIZER" not in os.environ, reason="set DQJAX_QWEN3_TOKENIZER to a folder of Qwen3's"
)
def test_qwen3s_own_template_renders_the_same():
    """Opt-in, with Qwen3's own tokenizer: 18,000 renderings of random conversations, odd ones among them."""
    own = transformers.AutoTokenizer.from_pretrained(os.environ["DQJAX_QWEN3_TOKENIZER"])
    theirs, ours = own.chat_template, template("qwen3")
    rng = random.Random(0)
    for _ in range(3000):
        turns = [{"role": "system", "content": rng.choice(["Be brief.", "  x\n"])}] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 4)):
            turns += [{"role": "user", "content": rng.choice(["3+4?", "hi\n", "<think>a</think>b"])}] * rng.choice(
                [1, 1, 2]
            )
            said = rng.choice(["7", "\n\n7", "<think>\nq\n</think>\n\n7", "a</think>b", "<think>x</think>y</think>z"])
            more = {"reasoning_content": rng.choice(["r", "\nr\n", "", None])} if rng.random() < 0.5 else {}
            turns += [{"role": "assistant", "content": said} | more] * rng.choice([1, 1, 1, 2])
        turns = turns[: len(turns) - rng.randint(0, 1)]
        for prompt in (True, False):
            for switch in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
                texts = [
                    own.apply_chat_template(
                        turns, chat_template=text, add_generation_prompt=prompt, tokenize=False, **switch
                    )
                    for text in (theirs, ours)
                ]
                assert texts[0] == texts[1], turns
    for text in (theirs, ours):
        own.chat_template = text
        chat = ChatFormat.of(own)
        assert (chat.end_id, chat.stop_ids, chat.has_switch, chat.opens_block) == (
            151645,
            (151643, 151645),
            True,
            False,
        )
