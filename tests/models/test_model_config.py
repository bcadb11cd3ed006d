"""config.json in and out, what is refused, and the named sizes."""

import dataclasses
import json

import jax
import pytest

from dqjax.models.config import SIZES, Yarn, from_huggingface, read_config, to_huggingface
from dqjax.models.decoder import Decoder
from dqjax.sharding import Rules, make_mesh

# As published with the releases (tied tables counted once).
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    """Our formula, our tree and transformers' own model of our config.json agree, and with the published count."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = SIZES[size]
    values = to_huggingface(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**values)
        )
    theirs = sum(p.numel() for p in model.parameters())  # a tied table is one parameter
    shapes = Decoder(config, Rules(make_mesh(devices=jax.devices()[:1]))).shapes()
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert config.num_parameters == ours == theirs == PARAMETERS.get(size, theirs)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert config.matmul_parameters == linear


BASE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, "Qwen2MoeForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"num_experts": 8}, "num_experts"),
        ({"num_local_experts": 8}, "num_experts"),
        ({"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6}}, "'longrope'"),
        ({"rope_scaling": {"type": "yarn"}}, "'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change, named):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(BASE | change))
    with pytest.raises(ValueError, match=named) as error:
        read_config(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\ufeff{}"])
def test_a_config_that_is_no_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match="no model config at"):
        read_config(tmp_path / "elsewhere")


def test_old_and_new_forms_are_one(tmp_path):
    old = BASE | {"rope_theta": 5e5, "torch_dtype": "bfloat16", "use_sliding_window": False, "sliding_window": 4096}
    new = BASE | {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"}
    assert from_huggingface(old) == from_huggingface(new)
    assert from_huggingface(old).rope_theta == 5e5 and from_huggingface(old).norm_eps == 1e-5
    yarn = {"factor": 4.0, "original_max_position_embeddings": 128}
    old = old | {"rope_scaling": yarn | {"type": "yarn"}}
    new = new | {"rope_parameters": yarn | {"rope_type": "yarn", "rope_theta": 5e5}}
    assert from_huggingface(old) == from_huggingface(new)
    assert from_huggingface(old).yarn == Yarn(4.0, 128)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("yarn", [None, Yarn(4.0, 32768), Yarn(2.0, 4096, 16.0, 2.0, 0.8, truncate=False)])
def test_to_huggingface_is_read_back_equal(size, yarn):
    config = dataclasses.replace(SIZES[size], yarn=yarn)
    assert from_huggingface(to_huggingface(config)) == config
    llama = dataclasses.replace(config, family="llama", attention_bias=False, qk_norm=False)
    assert from_huggingface(to_huggingface(llama)) == llama
