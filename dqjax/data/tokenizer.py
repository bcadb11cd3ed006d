"""Tokenizers: loaded with the checks that users meet first, or trained small for miniatures."""

import hashlib
import json
import pathlib
from collections.abc import Iterable
from typing import Any, Literal

from dqjax.config import ConfigError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK_TOKENS = ("<think>", "</think>")

# What the chat template writes round every text, and BPE should not spend several tokens on.
_TEMPLATE_WORDS = ("user", "assistant", "\n\n")


def template(name: Literal["qwen3", "think"]) -> str:
    """The text of a shipped chat template: `qwen3`, or `think`, which gives Qwen2.5 students think blocks."""
    return (pathlib.Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def load_tokenizer(
    folder: str | pathlib.Path, *, vocab_size: int | None = None, chat_template: Literal["keep", "think"] = "keep"
) -> Any:
    """A transformers tokenizer from a folder, checked for what training and serving need. No remote code runs.

    Args:
      folder: holds tokenizer.json (or another form that transformers reads) and tokenizer_config.json.
      vocab_size: rows of the model's embedding, to check that every token has one.
      chat_template: `keep` the folder's, or `think` for ours.

    Raises:
      ConfigError: nothing to load, no chat template, no stop or pad token, or more tokens than embedding rows.
    """
    from transformers import AutoTokenizer

    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no tokenizer at {folder}: expected a folder with tokenizer.json and tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # transformers raises OSError, ValueError, KeyError and json's errors, whatever is wrong
        raise ConfigError(f"cannot load a tokenizer from {folder}: {str(e).strip().splitlines()[0]}") from None
    if chat_template == "think":
        tokenizer.chat_template = template("think")
        missing = [t for t in SPECIAL_TOKENS[1:] if t not in tokenizer.get_added_vocab()]
        if missing:
            raise ConfigError(f"model.chat_template: think writes {missing[0]}, which the tokenizer in {folder} lacks")
    check_tokenizer(tokenizer, where=str(folder), vocab_size=vocab_size)
    return tokenizer


def check_tokenizer(tokenizer: Any, *, where: str, vocab_size: int | None = None) -> None:
    """Raises ConfigError, one line, for a tokenizer that cannot train or serve a chat model."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer in {where} has no chat template: take the instruct model's, or "
            "set model.chat_template: think"
        )
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer in {where} has no stop token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        raise ConfigError(f"the tokenizer in {where} has no pad token: set pad_token in its tokenizer_config.json")
    if vocab_size is not None and (size := max(tokenizer.get_vocab().values()) + 1) > vocab_size:
        raise ConfigError(
            f"the tokenizer in {where} has {size} tokens, the model's embedding {vocab_size} rows: "
            "they do not belong together"
        )


def token_fingerprint(tokenizer: Any) -> str:
    """A hash of which text every token id stands for."""
    return hashlib.blake2b(json.dumps(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()


def check_teacher_tokenizer(student: Any, teacher: Any, *, where: str) -> None:
    """Raises ConfigError unless each of the student's tokens has the same id with the teacher; that may know more."""
    theirs = teacher.get_vocab()
    for token, number in sorted(student.get_vocab().items(), key=lambda entry: entry[1]):
        if (other := theirs.get(token)) != number:
            has = "has no such token" if other is None else f"calls it {other}"
            raise ConfigError(
                f"the teacher in {where} has another tokenizer: token {number} of the student, {token!r}, is not its own: "
                f"it {has}. Distributions over other tokens cannot be compared; take a teacher of the student's family, "
                "or distil its text with objective: sft"
            )


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, max_length: int = 32768) -> Any:
    """A byte-level BPE with Qwen's pre-tokenizer, special tokens, think tokens and Qwen3's chat template.

    All 256 bytes are in it, so any text can be written; each digit is a token of its own.

    Args:
      texts: what it should write in few tokens, chains and prompts alike.
      vocab_size: entries at most, specials included; at least 261. Little text yields fewer.

    Returns:
      A transformers tokenizer; `save_pretrained` writes a folder that `load_tokenizer` and `AutoTokenizer` read.
    """
    from tokenizers import AddedToken, Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    specials = (*SPECIAL_TOKENS, *THINK_TOKENS)
    least = 256 + len(specials)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size: at least {least} (256 bytes and {len(specials)} special tokens), got {vocab_size}"
        )
    splitter = Qwen2Tokenizer().backend_tokenizer  # its normaliser and its pre-tokenizer, which isolates every digit
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(specials), initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    bpe.train_from_iterator((part for text in texts for part in (text, *_TEMPLATE_WORDS)), trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = dict(sorted(trained["vocab"].items(), key=lambda entry: entry[1]))
    vocab |= {token: len(vocab) + i for i, token in enumerate(specials)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    # As in Qwen's own files, the think tokens are not `special`: decoding with skip_special_tokens keeps them.
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK_TOKENS])
    tokenizer.chat_template = template("qwen3")
    return tokenizer
