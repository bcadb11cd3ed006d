"""What a server needs besides weights: tokenizer files, stop tokens, thinking mode, sampling defaults."""

import json
import logging
import pathlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from dqjax.convert.card import Thinking

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")

# What the Qwen3 cards advise; the source paper samples its thinking models in the same way.
THINKING_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
PLAIN_SAMPLING = {"temperature": 0.7, "top_p": 0.8, "top_k": 20}


def special_tokens(folder: pathlib.Path) -> dict[str, Any]:
    """`bos` and `pad` ids and the list `stop` of the tokenizer in `folder`; {} where there is none.

    Stop tokens are the end of a chat turn and of a text, where the tokenizer has them, and its own eos.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        log.warning("%s holds no tokenizer: the export cannot be served before one is added", folder)
        return {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    vocabulary = tokenizer.get_vocab()
    stops = [vocabulary[token] for token in STOP_TOKENS if token in vocabulary]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = vocabulary.get("<|endoftext|>", tokenizer.eos_token_id)
    return {"bos": tokenizer.bos_token_id, "pad": pad, "stop": stops}


def chat_template(folder: pathlib.Path) -> str:
    """The text of the chat template(s) in a folder, wherever it is kept; "" where there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if template:
                return template if isinstance(template, str) else json.dumps(template)
    return ""


def thinking_mode(template: str) -> Thinking:
    """Whether a model with this chat template thinks: by a switch, always, or never."""
    if "enable_thinking" in template:
        return "hybrid"
    return "always" if "<think>" in template else "none"


def generation_config(folder: pathlib.Path, tokens: Mapping[str, Any], thinking: Thinking) -> dict[str, Any]:
    """generation_config.json: it samples, since servers fall back on greedy decoding otherwise.

    A model that thinks gets the sampling advised for thinking; another keeps what its base advises, or gets Qwen's values.
    """
    base = folder / "generation_config.json"
    advised = json.loads(base.read_text(encoding="utf-8")) if base.is_file() else {}
    sampling = dict(THINKING_SAMPLING if thinking != "none" else PLAIN_SAMPLING)
    if thinking == "none":
        sampling |= {k: advised[k] for k in (*sampling, "repetition_penalty") if advised.get(k) is not None}
    stops = tokens.get("stop") or advised.get("eos_token_id")
    stops = [stops] if isinstance(stops, int) else stops
    values = {
        "bos_token_id": tokens.get("bos"),
        "pad_token_id": tokens.get("pad", advised.get("pad_token_id")),
        "eos_token_id": stops,
        "do_sample": True,
        **sampling,
        "transformers_version": version("transformers"),
    }
    return {key: value for key, value in values.items() if value is not None}
