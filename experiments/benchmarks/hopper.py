"""H200s that exist for the compiler alone: programs are compiled for them on a machine without a GPU.

Needs the `cuda-aot` extra: the CUDA plugin compiles, without a driver, for a device that a description stands in for.
The process has to run with ``JAX_PLATFORMS=cpu``.
"""

import functools
import importlib.metadata
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm")
DEVICE_BYTES = 151_397_597_184

# What the compiler asks of a device.
_H200 = f"""
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
gpu_device_info {{
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: {DEVICE_BYTES}
  memory_bandwidth: 4800000000000
  clock_rate_ghz: 1.98
  device_address_bits: 64
}}
"""


def missing() -> list[str]:
    """The packages that compiling needs and that are not installed; without libdevice the process would end."""
    absent = []
    for name in WHEELS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    return absent


def search_path() -> str:
    """What PATH has to be while something compiles: the first ptxas on it is taken."""
    folder = importlib.metadata.distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13/bin")
    return f"{folder}:{os.environ['PATH']}"


@functools.cache
def devices(count: int = 1) -> Sequence[jax.Device]:
    """So many of them, for the sharding of abstract arguments."""
    return topologies.get_topology_desc(platform="cuda", target_config=_H200, topology=f"1x1x{count}").devices
