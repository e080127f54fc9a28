# SPDX-License-Identifier: Apache-2.0
"""The GPU compiler without a GPU: XLA's plugin for CUDA compiles for a card that is only described, `ptxas` says what it takes.

Registers, spills and shared memory are those that the card would use. Times are not to be had this way.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# What the compiler asks about a card, from its data sheet.
CARDS = {
    "h200": """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
""",
}
_ARCHITECTURES = {"h200": "sm_90a"}
INSTALL = (
    "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc (the first two as old as jax itself)"
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one compiled kernel takes.

    Attributes:
      name: of the `pallas_call`, or of the compiler's own fusion.
      threads: of a block of the grid. registers: of a thread.
      spill_stores, spill_loads: bytes of a thread's registers that are written to memory for want of room, and read.
      shared_memory: bytes of a block. products: matrix instructions in the code, wgmma (Hopper's own) and mma.
      copies: instructions that copy to shared memory beside the work.
    """

    name: str
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int
    shared_memory: int
    products: dict[str, int]
    copies: int


def missing() -> str:
    """What is not installed; empty when all is there."""
    names = [name for name in ("jax_cuda13_plugin",) if importlib.util.find_spec(name) is None]
    if _ptxas() is None:
        names.append("ptxas")
    return " and ".join(names)


def prepare() -> None:
    """Looks for the compiler.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    if names := missing():
        raise ModuleNotFoundError(f"the GPU compiler is not there ({names}): {INSTALL}")


def compile_kernels(function: Callable[..., Any], arguments: Any, card: str) -> list[Kernel]:
    """The kernels of `function`, compiled for a described card.

    Raises:
      ValueError: an unknown card, or a version of the compiler that does not write what it made.
      jax.errors.JaxRuntimeError: the compiler refuses: more shared memory than the card has, for one.
    """
    if card not in CARDS:
        raise ValueError(f"unknown card {card!r}; one of {', '.join(CARDS)}")
    device = topologies.get_topology_desc(platform="cuda", target_config=CARDS[card], topology="1x1x1").devices[0]
    mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
    # Later versions of Pallas ask the mesh which card they are for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    with tempfile.TemporaryDirectory(prefix="adaptive_gpu_") as folder:
        # Without a card nothing can be tuned by trying.
        lowered.compile(compiler_options={"xla_gpu_autotune_level": 0, "xla_dump_to": folder})
        dump = pathlib.Path(folder)
        launches = "".join(path.read_text() for path in dump.glob("*.thunk_sequence.txt"))
        found = []
        for path in sorted(dump.glob("*.ptx")):
            # A module without a kernel is an empty file.
            if ".entry" not in path.read_text():
                continue
            command = [_ptxas(), "-v", f"-arch={_ARCHITECTURES[card]}", str(path), "-o", f"{path}.out"]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            found += kernels(path.read_text(), report, launches)
        if not found:
            raise ValueError("the compiler wrote no code of kernels to read; jax 0.10 does, 0.11 does not unasked")
        return found


def kernels(code: str, report: str, launches: str) -> list[Kernel]:
    """The kernels of one module: from its PTX, from what `ptxas -v` says of it, and from how the program launches them.

    Raises:
      ValueError: `ptxas` says nothing of a kernel that the code has: another version of it, perhaps.
    """
    found = []
    for body in re.split(r"(?=\.visible \.entry )", code)[1:]:
        name = re.match(r"\.visible \.entry (\w+)", body)[1]
        said = re.search(rf"Compiling entry function '{name}'.*?Used (\d+) registers", report, re.S)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said[0] if said else "")
        if not spills:
            raise ValueError(f"ptxas does not say what {name} takes: {report[:200]!r}")
        launch = re.search(rf"\b{name} grid: .*?threads: \[(\d+).*?shared_memory: (\d+)", launches)
        threads, shared = map(int, launch.groups()) if launch else (0, 0)
        found.append(
            Kernel(
                name,
                threads=threads,
                registers=int(said[1]),
                spill_stores=int(spills[1]),
                spill_loads=int(spills[2]),
                shared_memory=shared,
                products={"wgmma": body.count("wgmma.mma_async"), "mma": body.count("mma.sync")},
                copies=body.count("cp.async.c"),
            )
        )
    return found


def _ptxas() -> str | None:
    """The assembler that comes in NVIDIA's wheel."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(pathlib.Path(folder).glob("*/bin/ptxas")):
            return str(path)
    return None
