"""The parts of a decoder layer: linear maps, RMSNorm, RoPE, the gated MLP. Parameters are float32, compute is `dtype`."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dqjax.models.config import ModelConfig


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products where float32 was asked for: the accelerators' default would round the inputs."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Linear(nn.Module):
    """`einsum(spec, x, kernel) (+ bias)` with logical axis names on the kernel.

    Where the parameters hold `lora_a` and `lora_b` beside the kernel (`models.lora`), x · A · B is added.

    Attributes:
      spec: contraction in the library's letters, for example "BTD,DNH->BTNH".
      shape: kernel shape; names: its logical axes, one a dimension.
      bias_dims: trailing kernel dimensions that the bias covers; 0 for none.
    """

    spec: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    dtype: jnp.dtype
    bias_dims: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_partitioning(nn.initializers.normal(0.02), self.names)
        kernel = self.param("kernel", init, self.shape, jnp.float32).astype(self.dtype)
        y = jnp.einsum(self.spec, x.astype(self.dtype), kernel, precision=precision_of(self.dtype))
        if self.has_variable("params", "lora_a"):
            a, b = (self.get_variable("params", name).astype(self.dtype) for name in ("lora_a", "lora_b"))
            rows, inner, out = _low_rank(self.spec)
            low = jnp.einsum(f"{rows},{inner}->BTR", x.astype(self.dtype), a, precision=precision_of(self.dtype))
            y += jnp.einsum(f"BTR,{out}", low, b, precision=precision_of(self.dtype))
        if self.bias_dims:
            init = nn.with_partitioning(nn.initializers.zeros, self.names[-self.bias_dims :])
            y += self.param("bias", init, self.shape[-self.bias_dims :], jnp.float32).astype(self.dtype)
        return y


def _low_rank(spec: str) -> tuple[str, str, str]:
    """"BTD,DNH->BTNH" as the letters of x, of A, and of B with the result: BTD, DR, RNH->BTNH."""
    operands, result = spec.split("->")
    rows, kernel = operands.split(",")
    inputs = "".join(letter for letter in kernel if letter not in result)
    return rows, f"{inputs}R", f"R{kernel.removeprefix(inputs)}->{result}"


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · scale over the last axis; the statistics in float32."""

    eps: float
    dtype: jnp.dtype
    axis_name: str = "table"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_partitioning(nn.initializers.ones, (self.axis_name,))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x)): SwiGLU, https://arxiv.org/abs/2002.05202."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        d, f = self.config.hidden_size, self.config.mlp_size
        if self.has_variable("params", "gate_up"):  # as `Decoder.unstack` joins them
            joined = Linear("BTD,DF->BTF", (d, 2 * f), ("embed", "mlp"), self.dtype, name="gate_up")
            gate, up = jnp.split(joined(x), 2, axis=-1)
        else:
            gate = Linear("BTD,DF->BTF", (d, f), ("embed", "mlp"), self.dtype, name="gate")(x)
            up = Linear("BTD,DF->BTF", (d, f), ("embed", "mlp"), self.dtype, name="up")(x)
        return Linear("BTF,FD->BTD", (f, d), ("mlp", "embed"), self.dtype, name="down")(nn.silu(gate) * up)


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """Angle a position for each of the H/2 planes: θ^(−2i/H), by parts interpolated under YaRN.

    With factor s and original context C, plane i turns C·f_i/2π times. Planes that turn more than beta_fast times keep
    f_i, those under beta_slow take f_i/s, and between the two dimensions a linear ramp blends
    (https://arxiv.org/abs/2309.00071, section 3.2).
    """
    half = config.head_dim // 2
    base = config.rope_theta ** -(np.arange(half, dtype=np.float64) / half)
    if config.yarn is None:
        return base.astype(np.float32)
    yarn = config.yarn

    def plane_of(rotations: float) -> float:
        """The (fractional) plane that turns so often over the original context."""
        return half * math.log(yarn.original_max_positions / (rotations * 2 * math.pi)) / math.log(config.rope_theta)

    low, high = plane_of(yarn.beta_fast), plane_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    return (base / yarn.factor * ramp + base * (1 - ramp)).astype(np.float32)


def rope_tables(
    config: ModelConfig, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """cos and sin of every position and plane, float32, h = H/2; YaRN's magnitude included."""
    angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config)
    magnitude = config.yarn.magnitude if config.yarn else 1.0
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def rotate(x: Float[Array, "B T N H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]) -> Float[Array, "B T N H"]:
    """RoPE in half-split form: plane i is spanned by components i and i + H/2 (https://arxiv.org/abs/2104.09864)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
