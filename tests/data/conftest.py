"""Small tokenizers with Qwen3's and Qwen2.5's templates; no vocabulary is downloaded."""

import json

import hypothesis
import pytest
import tokenizers
import transformers

from dqjax.data.chat import ChatFormat
from dqjax.data.tokenizer import train_tokenizer

hypothesis.settings.register_profile("data", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("data")

QWEN25_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) or message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TEXTS = [
    "What is 12 + 34? The answer is 46.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
] * 20


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    train_tokenizer(TEXTS, 340).save_pretrained(folder)
    return folder


@pytest.fixture
def qwen3(qwen3_folder):
    return transformers.AutoTokenizer.from_pretrained(qwen3_folder)


@pytest.fixture
def qwen25(qwen3_folder):
    """Qwen2.5 as it matters here: no think tokens, a default system prompt, a template that knows no thinking."""
    plain = json.loads((qwen3_folder / "tokenizer.json").read_text())
    plain["added_tokens"] = [t for t in plain["added_tokens"] if "think" not in t["content"]]
    for token in ("<think>", "</think>"):
        del plain["model"]["vocab"][token]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(plain)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = QWEN25_TEMPLATE
    return tokenizer


@pytest.fixture
def chat3(qwen3):
    return ChatFormat.of(qwen3)


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows (objects, or bytes for lines that are none) to a jsonl file and returns its path."""

    def write(rows, name="rows.jsonl"):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write
