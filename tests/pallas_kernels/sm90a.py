"""Compiles a kernel for Hopper without a GPU: python -m tests.pallas_kernels.sm90a MODULE:FUNCTION

FUNCTION returns (function to compile, argument shapes). It is compiled in a process of its own, because the CUDA
plugin must know before JAX starts that there is no driver to ask for its versions. With MOSAIC_GPU_DUMP_PTXAS=1
standard output shows the assembler's register and spill counts, with MOSAIC_GPU_DUMP_SASS=1 the machine code.
Exit status 77: this installation cannot compile for Hopper; the last line of output says why.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CANNOT = 77
REGISTER_FILE = 65_536  # 32-bit registers of a multiprocessor, the most that one thread block can hold
ROOT = Path(__file__).resolve().parents[2]
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150754820096
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


def resources(target: str) -> list[dict[str, int]]:
    """Registers per thread at launch and spilled bytes per thread, of each kernel that ``target`` compiles.

    Skips the test where kernels cannot be compiled.
    """
    text = _compile(target, "MOSAIC_GPU_DUMP_PTXAS")
    spills = [int(n) for n in re.findall(r"stack frame, (\d+) bytes spill stores", text)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    return [{"registers": r, "spills": s} for r, s in zip(registers, spills, strict=True)]


def instructions(target: str, name: str) -> list[str]:
    """The lines of machine code with the instruction ``name``. Skips the test where kernels cannot be compiled."""
    return [line for line in _compile(target, "MOSAIC_GPU_DUMP_SASS").splitlines() if f" {name}." in line]


def _compile(target: str, dump: str) -> str:
    environment = os.environ | {
        "JAX_PLATFORMS": "cuda,cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        dump: "1",
    }
    command = [sys.executable, "-m", "tests.pallas_kernels.sm90a", target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode == CANNOT:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def main(target: str) -> int:
    try:
        import jax_plugins.xla_cuda13  # noqa: F401
        import nvidia.cu13 as toolkit
    except ImportError as missing:
        print(f"needs jax-cuda13-plugin and the CUDA wheels: {missing}")
        return CANNOT
    if not any((Path(path) / "bin" / "ptxas").exists() for path in toolkit.__path__):
        print("needs ptxas from nvidia-cuda-nvcc")
        return CANNOT
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the check would ask the driver, and there is none

    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if jax.__version_info__ < (0, 11):
        print(f"needs jax 0.11, this is {jax.__version__}")
        return CANNOT
    jax.devices("cpu")
    topology = topologies.get_topology_desc(
        topology_name="h200", platform="cuda", target_config=H200, topology="1x1x1"
    )
    mesh = Mesh(np.array(topology.devices), ("x",))
    module, name = target.split(":")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(jax.devices("cpu")[0]):
        function, shapes = getattr(importlib.import_module(module), name)()
        sharding = NamedSharding(mesh, PartitionSpec())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
        arguments = jax.tree.map(place, shapes)
        jax.jit(function).lower(*arguments).compile()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
