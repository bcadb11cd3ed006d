"""What a decoder is made of, read from a Hugging Face `config.json`, and the sizes that have names.

`config.json` decides everything. A feature that is not implemented is refused by name, never ignored.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

Family = Literal["llama", "qwen2", "qwen3"]

ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: long-context RoPE by parts (https://arxiv.org/abs/2309.00071, section 3).

    Attributes:
      factor: context extension, ≥ 1.
      original_max_positions: positions of the pre-training.
      beta_fast, beta_slow: rotations over the original context at which the blend starts and ends.
      attention_factor: multiplies cos and sin; None means 0.1·ln(factor) + 1.
      truncate: round the blend's ends outwards to whole dimensions, as transformers does by default.
    """

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape and arithmetic of a decoder-only transformer of the Llama/Qwen2/Qwen3 kind.

    Letters as everywhere: V vocabulary (rows of the embedding table, padding included), D model, F feed-forward,
    L layers, N query heads, K key-value heads, H head size.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_embeddings: bool
    norm_eps: float = 1e-6
    rope_theta: float = 1e6
    yarn: Yarn | None = None
    max_positions: int = 32768
    attention_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads evenly; "
                "num_attention_heads must be a multiple of num_key_value_heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")

    @property
    def matmul_parameters(self) -> int:
        """Parameters that take part in a matrix product once a token: output table counted, embedding lookup not."""
        d, f, h = self.hidden_size, self.mlp_size, self.head_dim
        layer = d * h * (2 * self.num_heads + 2 * self.num_kv_heads) + 3 * d * f
        return self.num_layers * layer + self.vocab_size * d

    @property
    def num_parameters(self) -> int:
        """All parameters of the language model, a tied table counted once."""
        d, h = self.hidden_size, self.head_dim
        small = 2 * d + (2 * h if self.qk_norm else 0)
        small += (self.num_heads + 2 * self.num_kv_heads) * h if self.attention_bias else 0
        table = 0 if self.tie_embeddings else self.vocab_size * d
        return self.matmul_parameters + table + self.num_layers * small + d


def _qwen2(d, layers, n, k, f, vocab=151936, tie=True, positions=32768) -> ModelConfig:
    return ModelConfig(
        "qwen2", vocab, d, f, layers, n, k, d // n, tie, attention_bias=True, max_positions=positions
    )


def _qwen3(d, layers, n, k, f, tie=True) -> ModelConfig:
    return ModelConfig("qwen3", 151936, d, f, layers, n, k, 128, tie, qk_norm=True, max_positions=40960)


SIZES: dict[str, ModelConfig] = {
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, 152064, tie=False),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824, 152064, tie=False),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, 152064, tie=False),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 8, 6144),
    "qwen3-4b": _qwen3(2560, 36, 32, 8, 9728),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288, tie=False),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408, tie=False),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600, tie=False),
    "miniature": dataclasses.replace(
        _qwen3(128, 3, 4, 2, 384), vocab_size=512, head_dim=32, max_positions=1024
    ),
}


def read_config(path: str | pathlib.Path) -> ModelConfig:
    """Reads `config.json` (or the folder that holds it).

    Raises:
      ValueError: the file is missing, is not JSON, lacks a key, or asks for something not implemented; names the file.
    """
    path = pathlib.Path(path)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no model config at {path}; expected a Hugging Face folder with config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is not valid JSON ({e}); copy it again from its source") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    try:
        return from_huggingface(values)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """A `ModelConfig` from the keys of a Hugging Face config, old (`rope_theta`) or new (`rope_parameters`)."""
    architectures = values.get("architectures") or []
    known = [a for a in architectures if a in ARCHITECTURES]
    if not known:
        by_type = {family: name for name, family in ARCHITECTURES.items()}
        if architectures or values.get("model_type") not in by_type:
            got = architectures or values.get("model_type")
            raise ValueError(f"architecture {got} is not implemented; implemented: {', '.join(ARCHITECTURES)}")
        known = [by_type[values["model_type"]]]
    family = ARCHITECTURES[known[0]]
    _refuse_unimplemented(values)

    def need(key):
        if values.get(key) is None:
            raise ValueError(f"key {key!r} is missing")
        return values[key]

    hidden, heads = int(need("hidden_size")), int(need("num_attention_heads"))
    theta, yarn = _rope(values)
    return ModelConfig(
        family=family,
        vocab_size=int(need("vocab_size")),
        hidden_size=hidden,
        mlp_size=int(need("intermediate_size")),
        num_layers=int(need("num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or (128 if family == "qwen3" else hidden // heads)),
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        yarn=yarn,
        max_positions=int(values.get("max_position_embeddings", 32768)),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
    )


def _refuse_unimplemented(values: Mapping[str, Any]) -> None:
    if values.get("use_sliding_window"):
        raise ValueError("use_sliding_window: true is not implemented; sliding layers would be computed as full ones")
    if any(kind != "full_attention" for kind in values.get("layer_types") or []):
        raise ValueError(f"layer_types {sorted(set(values['layer_types']))} are not implemented, only full_attention")
    if values.get("num_experts") or values.get("num_local_experts"):
        raise ValueError("mixture-of-experts layers (num_experts) are not implemented")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']!r} is not implemented, only silu")
    if values.get("model_type") in ("llama", "qwen3") and values.get("attention_bias"):
        raise ValueError(f"attention_bias: true is not implemented for {values['model_type']}")
    if values.get("mlp_bias"):
        raise ValueError("mlp_bias: true is not implemented")
    if values.get("quantization_config"):
        raise ValueError("quantization_config: quantised weights cannot be trained here; start from the bf16 release")


def _rope(values: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    """Base frequency and scaling: `rope_parameters` of newer configs, `rope_theta` + `rope_scaling` of older ones."""
    new = dict(values.get("rope_parameters") or {})
    scaling = new or dict(values.get("rope_scaling") or {})
    theta = float(new.get("rope_theta") or values.get("rope_theta") or 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if float(scaling.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("partial_rotary_factor below 1 is not implemented")
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ValueError(f"rope scaling {kind!r} is not implemented; implemented: default, yarn")
    if scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise ValueError("yarn with mscale/mscale_all_dim is not implemented")
    if "factor" not in scaling:
        raise ValueError("yarn: key 'factor' is missing in the rope scaling")
    attention_factor = scaling.get("attention_factor")
    return theta, Yarn(
        factor=float(scaling["factor"]),
        original_max_positions=int(
            scaling.get("original_max_position_embeddings") or values.get("max_position_embeddings", 32768)
        ),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        attention_factor=None if attention_factor is None else float(attention_factor),
        truncate=bool(scaling.get("truncate", True)),
    )


def to_huggingface(config: ModelConfig, *, dtype: str = "bfloat16") -> dict[str, Any]:
    """The keys of `config.json` that describe the model, in the newest transformers' form."""
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_positions,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
        }
        if config.yarn.attention_factor is not None:
            rope["attention_factor"] = config.yarn.attention_factor
        if not config.yarn.truncate:
            rope["truncate"] = False
    values = {
        "architectures": [{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[config.family] + "ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "dtype": dtype,
    }
    if config.family == "llama":
        values |= {"attention_bias": False, "mlp_bias": False}
    else:
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    if config.family == "qwen3":
        values["attention_bias"] = False
    if config.family != "qwen2" or config.head_dim * config.num_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return values
