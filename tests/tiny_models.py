"""Tiny random models of transformers saved as Hugging Face folders."""

import functools

import jax
import pytest

from dqjax.convert.huggingface import load_params
from dqjax.models.config import read_config
from dqjax.models.decoder import Decoder
from dqjax.sharding import Rules, make_mesh

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """make(family, ratio, head_dim, tied, …) → (torch model, folder): every tensor random, biases and norms included."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    @functools.cache
    def make(family, ratio=2, head_dim=64, tied=True, kv_heads=None, layers=2, vocab=160, seed=0, **options):
        kv_heads = kv_heads or (1 if ratio == 7 else 2)
        heads = ratio * kv_heads
        hidden = 96 if family == "qwen3" else heads * head_dim  # Qwen3: heads × head_dim ≠ hidden
        config = getattr(transformers, FAMILIES[family] + "Config")(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=112,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
            attn_implementation="eager",
            **{k: dict(v) if isinstance(v, tuple) else v for k, v in options.items()},  # tuples of pairs: hashable dicts
        )
        generator = torch.Generator().manual_seed(seed)
        model = getattr(transformers, FAMILIES[family] + "ForCausalLM")(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.08
                parameter.copy_(1 + noise if "norm" in name else noise)
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def load():
    """load(folder, rules=one device, **options) → (decoder, params) through our converter, in float32."""

    def load(folder, rules=None, **options):
        rules = rules or Rules(make_mesh(devices=jax.devices()[:1]))
        decoder = Decoder(read_config(folder), rules, **options)
        return decoder, load_params(folder, decoder.config, decoder.shardings())

    return load
