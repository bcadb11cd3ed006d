"""The CUDA compiler over the Hopper kernels, without a GPU: they compile, and keep their registers.

    pip install -e '.[cuda,test]' && pytest tests/kernels/test_hopper_compile.py       on Python 3.12 or newer

Skipped where jax's CUDA plugin, which brings the compiler, is not installed.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
"""

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from dqjax.kernels.attention.api import attention, make_plan

target, head_size = sys.argv[1], int(sys.argv[2])
device = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1").devices[0]
place = jax.sharding.SingleDeviceSharding(device)

def total(q, k, v, segment_ids):
    plan = make_plan(segment_ids, backend="mosaic_gpu")
    out = attention(q, k, v, q_segment_ids=segment_ids, backend="mosaic_gpu", plan=plan)
    return jnp.sum(out.astype(jnp.float32))

shapes = ((2, 4096, 16, head_size), jnp.bfloat16), *[((2, 4096, 8, head_size), jnp.bfloat16)] * 2, ((2, 4096), jnp.int32)
operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*operands).compile()
"""

MOST_SPILLED = {"attention_forward": 0, "attention_dq": 52, "attention_dkv": 32}
"""Bytes stored to local memory. A few registers of the backward kernels do not fit beside their accumulators."""


def toolkit():
    """The folder of the compiler that jax's CUDA plugin brings, or the reason why there is none."""
    if jax.__version_info__ < (0, 11, 2):
        return None, "jax before 0.11.2 cannot compile these kernels"
    if not importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec("jax_plugins.xla_cuda13"):
        return None, "jax's CUDA plugin is not installed"
    for folder in importlib.util.find_spec("nvidia").submodule_search_locations:
        if (root := pathlib.Path(folder) / "cu13").joinpath("bin", "ptxas").exists():
            return root, None
    return None, "the CUDA compiler (nvidia-cuda-nvcc) is not installed"


@pytest.mark.parametrize("head_size", [64, 128])
def test_forward_and_backward_compile_and_keep_their_registers(tmp_path, head_size):
    root, missing = toolkit()
    if missing:
        pytest.skip(missing)
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "CUDA_ROOT": str(root),
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
    }
    command = [sys.executable, "-c", PROGRAM, H200, str(head_size)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = {path.name.rsplit("_", 1)[0]: path.read_text() for path in tmp_path.glob("*.ptxas")}
    assert set(reports) == set(MOST_SPILLED)
    for kernel, report in reports.items():
        assert "serialized" not in report, report
        (spilled,) = re.findall(r"stack frame, (\d+) bytes spill stores", report)
        assert int(spilled) <= (MOST_SPILLED[kernel] if head_size == 128 else 0), report
