"""Devices of machines that are not here, to compile for: TPU slices by libtpu, Hopper GPUs by jax's CUDA plugin.

    v5p:2x2x2    generation : chips along each axis
    h200:8       GPU : how many
"""

import importlib.util
import os
import pathlib
from typing import Any

from dqjax.config import ConfigError

HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 192, "h100": 79, "h200": 140}
"""Memory of a device; the makers' datasheets, and for GPUs what their driver leaves."""

HOPPER = {"h100": 3.35e12, "h200": 4.8e12}  # bytes a second of device memory
EXAMPLES = "v5p:2x2x2 with `pip install libtpu`, or h200:8 with `pip install 'jax[cuda13]'`"


def devices_of(topology: str) -> list[Any]:
    """The devices of a topology such as "v5p:2x2x2" or "h200:8".

    Raises:
      ConfigError: no such topology, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    try:
        return _gpus(name, int(shape)) if name in HOPPER else _tpus(topology)
    except Exception as e:  # the compilers' own errors have no common type
        text = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ConfigError(f"topology {topology}: {text} (expected for example {EXAMPLES})") from None


def _tpus(topology: str) -> list[Any]:
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a chip that two processes could fight over
    return list(topologies.get_topology_desc(topology, "tpu").devices)


def _gpus(name: str, count: int) -> list[Any]:
    from jax.experimental import topologies

    if why := why_no_cuda_compiler():
        raise ValueError(why)
    os.environ.setdefault("CUDA_ROOT", str(cuda_root()))
    os.environ["PATH"] = f"{cuda_root() / 'bin'}{os.pathsep}{os.environ['PATH']}"
    target = TARGET.format(memory=HBM_GIB[name] * 2**30, bandwidth=int(HOPPER[name]))
    return list(
        topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}").devices
    )


def why_no_cuda_compiler() -> str | None:
    """What of the CUDA compiler is missing here, or None."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "jax's CUDA plugin is not installed"
    return None if cuda_root() else "the CUDA compiler (nvidia-cuda-nvcc) is not installed"


def cuda_root() -> pathlib.Path | None:
    """The folder of the CUDA compiler that comes with jax's CUDA plugin."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = (pathlib.Path(place) / "cu13" for place in (nvidia.submodule_search_locations if nvidia else ()))
    return next((folder for folder in folders if (folder / "bin" / "ptxas").exists()), None)


TARGET = """
platform_name: "CUDA"
gpu_device_info {{
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
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
}}
"""
