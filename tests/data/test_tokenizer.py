"""Small tokenizers, and the faults of tokenizer folders that users meet first."""

import json
import logging
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat
from dqjax.data.tokenizer import load_tokenizer, template, train_tokenizer


def test_every_digit_is_a_token_and_specials_are_one(qwen3):
    assert qwen3.tokenize("1234567") == list("1234567")
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"):
        assert len(qwen3(token, add_special_tokens=False)["input_ids"]) == 1
    assert (qwen3.eos_token, qwen3.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert max(qwen3.get_vocab().values()) + 1 == len(qwen3) <= 340
    shown = qwen3.decode(qwen3("<|im_start|><think>7")["input_ids"], skip_special_tokens=True)
    assert shown == "<think>7"  # a server that skips special tokens still shows the think block, as Qwen3's does


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_text_is_written_and_read_back(qwen3, text):
    import unicodedata

    ids = qwen3(text, add_special_tokens=False)["input_ids"]
    assert qwen3.decode(ids) == unicodedata.normalize("NFC", text)


def test_the_folder_loads_by_itself_without_a_warning(qwen3_folder):
    code = (
        "import warnings; warnings.simplefilter('error'); from transformers import AutoTokenizer; "
        f"t = AutoTokenizer.from_pretrained({str(qwen3_folder)!r}); "
        "assert t.chat_template and type(t).__name__ == 'Qwen2Tokenizer'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


def test_training_is_deterministic_and_bounded():
    texts = ["abc abd 123"] * 50
    one, two = train_tokenizer(texts, 300), train_tokenizer(texts, 300)
    assert one.get_vocab() == two.get_vocab()
    with pytest.raises(ValueError, match="at least 261"):
        train_tokenizer(texts, 260)


def test_a_good_folder(qwen3_folder, qwen3, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = load_tokenizer(qwen3_folder, vocab_size=len(qwen3))
    assert not caplog.records
    assert loaded.get_vocab() == qwen3.get_vocab() and loaded.chat_template == template("qwen3")
    thinking = load_tokenizer(qwen3_folder, chat_template="think")
    assert thinking.chat_template == template("think")
    assert ChatFormat.of(thinking).has_switch


def change(qwen3, folder, **values):
    qwen3.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_faults_are_one_line_each(qwen3, tmp_path):
    def refused(reason, **options):
        with pytest.raises(ConfigError, match=reason) as caught:
            load_tokenizer(tmp_path, **options)
        assert "\n" not in str(caught.value)

    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    refused("cannot load a tokenizer")
    change(qwen3, tmp_path)
    refused(f"has {len(qwen3)} tokens, the model's embedding 300 rows", vocab_size=300)
    change(qwen3, tmp_path, pad_token=None)
    refused("no pad token")
    change(qwen3, tmp_path, eos_token=None)
    refused("no stop token")
    change(qwen3, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    refused("no chat template: take the instruct model's, or set model.chat_template: think")
    load_tokenizer(tmp_path, chat_template="think")
    (tmp_path / "tokenizer.json").write_text("{")
    refused("cannot load a tokenizer")
