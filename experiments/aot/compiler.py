# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler without a TPU: it is in the libtpu wheel, and compiles for a machine that is only described."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a schedule is turned into time with, for one core.

    Attributes:
      name: of the generation.
      flops_per_cycle: of all its matrix units in bfloat16; read off the schedules of large products.
      peak: floating-point operations a second in bfloat16. bandwidth: bytes a second of HBM. memory: bytes of HBM.
      cores: that a kernel's parallel steps are divided over.
    """

    name: str
    flops_per_cycle: int
    peak: float
    bandwidth: float
    memory: int
    cores: int = 1

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak / self.flops_per_cycle


_GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 131_072, 137.5e12, 614.0e9, 16 * _GIB, cores=2),
        Chip("v5e", 131_072, 197.0e12, 819.0e9, 16 * _GIB),
        Chip("v5p", 131_072, 229.5e12, 1382.5e9, 47 * _GIB, cores=2),
        Chip("v6e", 524_288, 918.0e12, 1638.0e9, 32 * _GIB),
    )
}
# The smallest machine of each generation.
SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}
# Listings that `schedule` reads; the whole dump is dozens of files for each program.
_PASSES = "(packed-bundles-post-ra|post-delay-converter|utilization)"


def prepare(dump: str | os.PathLike[str] = "") -> None:
    """Sets what libtpu reads once, when it is loaded: call it before any device is described.

    Args:
      dump: folder that the compiler then writes its schedules to; none when empty.

    Raises:
      ModuleNotFoundError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("the TPU compiler is in the package libtpu: pip install libtpu (Linux, x86-64)")
    settings = {
        # There is no metadata server to ask, and several processes may compile at once.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    if dump:
        flags = (
            f"--xla_jf_dump_to={dump}",
            "--xla_jf_dump_llo_text=true",
            f"--xla_jf_dump_llo_pass_label_regex={_PASSES}",
        )
        os.environ["LIBTPU_INIT_ARGS"] = " ".join([os.environ.get("LIBTPU_INIT_ARGS", ""), *flags]).strip()


def chip(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4".

    Raises:
      ValueError: an unknown generation.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"unknown TPU generation {name!r} in topology {topology!r}; one of {', '.join(CHIPS)}")
    return CHIPS[name]


def devices(topology: str) -> list[Any]:
    """The devices of a machine such as "v5e:4x4" or "v5p:4x4x4", which need not exist.

    Raises:
      ValueError: an unknown generation, or a shape that it does not come in.
    """
    name = chip(topology).name
    # A v4 is described core by core unless told otherwise; users see chips.
    options = {"chip_config_name": "megacore"} if name == "v4" else {}
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"no TPU of shape {topology!r}: {str(error).splitlines()[0]}") from error
    return list(description.devices)


def memory(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled step takes on each device: arguments, outputs that are no arguments, temporaries, code; and all."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    return {**parts, "all": sum(parts.values())}
