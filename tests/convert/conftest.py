"""Tiny random Hugging Face folders, written by transformers."""

import functools
import json

import pytest

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer with Qwen's special tokens and Qwen3's chat template."""
    from dqjax.data.tokenizer import train_tokenizer

    return train_tokenizer(["12 + 34 = 46", "What is 3 + 4?"], 300)


@pytest.fixture(scope="session")
def make_model():
    """make(family, tied, seed) → a torch model with 320 entries, every tensor random, biases and norms included."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    @functools.cache
    def make(family, tied, seed=0):
        config = getattr(transformers, FAMILIES[family] + "Config")(
            vocab_size=320,
            hidden_size=48 if family == "qwen3" else 64,
            intermediate_size=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=tied,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
        )
        model = getattr(transformers, FAMILIES[family] + "ForCausalLM")(config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ("norm" in name))
        return model

    return make


@pytest.fixture
def folder_of(make_model, tokenizer, tmp_path):
    """folder_of(family, tied, dtype, shard, serving=False) → a folder as the hub has them."""
    torch = pytest.importorskip("torch")

    def write(family="qwen3", tied=True, dtype="float32", shard="5GB", serving=False):
        folder = tmp_path / f"{family}-base"
        model = make_model(family, tied)
        try:
            model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
        finally:
            model.to(torch.float32)
        if serving:
            tokenizer.save_pretrained(folder)
            (folder / "LICENSE").write_text("                      Apache License\n                Version 2.0, January 2004\n")
            (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "repetition_penalty": 1.05}))
        return folder

    return write
