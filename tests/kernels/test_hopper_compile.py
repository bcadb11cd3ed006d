"""The CUDA compiler over the Hopper kernels, without a GPU: they compile, and keep their registers.

    pip install -e '.[cuda,test]' && pytest tests/kernels/test_hopper_compile.py       on Python 3.12 or newer

Skipped where jax's CUDA plugin, which brings the compiler, is not installed.
"""

import os
import re
import subprocess
import sys

import jax
import pytest

from dqjax.topology import why_no_cuda_compiler

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from dqjax.kernels.attention.api import attention, make_plan
from dqjax.topology import devices_of

head_size = int(sys.argv[1])
place = jax.sharding.SingleDeviceSharding(devices_of("h200:1")[0])

def total(q, k, v, segment_ids):
    plan = make_plan(segment_ids, backend="mosaic_gpu")
    out = attention(q, k, v, q_segment_ids=segment_ids, backend="mosaic_gpu", plan=plan)
    return jnp.sum(out.astype(jnp.float32))

shapes = ((2, 4096, 16, head_size), jnp.bfloat16), *[((2, 4096, 8, head_size), jnp.bfloat16)] * 2, ((2, 4096), jnp.int32)
operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*operands).compile()
"""

MOST_SPILLED = {"attention_forward": 0, "attention_dq": 32, "attention_dkv": 28}
"""Bytes stored to local memory. A few registers of the backward kernels do not fit beside their accumulators."""


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="jax before 0.11.2 cannot compile these kernels")
@pytest.mark.skipif(why_no_cuda_compiler() is not None, reason=str(why_no_cuda_compiler()))
@pytest.mark.parametrize("head_size", [64, 128])
def test_forward_and_backward_compile_and_keep_their_registers(tmp_path, head_size):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(head_size)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = {path.name.rsplit("_", 1)[0]: path.read_text() for path in tmp_path.glob("*.ptxas")}
    assert set(reports) == set(MOST_SPILLED)
    for kernel, report in reports.items():
        assert "serialized" not in report, report
        (spilled,) = re.findall(r"stack frame, (\d+) bytes spill stores", report)
        assert int(spilled) <= (MOST_SPILLED[kernel] if head_size == 128 else 0), report
