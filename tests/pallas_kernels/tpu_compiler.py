# SPDX-License-Identifier: Apache-2.0
"""Compiles functions for TPUs that are only described: the compiler is in the libtpu wheel and needs no TPU."""

import functools
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# One chip in every run of the suite; the others, over a hundred compilations, with `make test-chips`.
CHIPS = ("v5e", *(pytest.param(chip, marks=pytest.mark.every_chip) for chip in ("v4", "v5p", "v6e")))
# A v4 is described core by core unless told otherwise; users see chips.
_TOPOLOGIES = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:1x1", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:1x1", {}),
    "4 x v5e": ("v5e:2x2", {}),
}


@functools.cache
def mesh(chip):
    """A mesh with one automatic axis over the devices of a described machine; one device unless its name says more."""
    pytest.importorskip("libtpu", reason="the TPU compiler is in libtpu, which is not installed")
    # Several test processes may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, options = _TOPOLOGIES[chip]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    devices = devices if " x " in chip else devices[:1]
    return Mesh(np.array(devices), ("batch",), axis_types=(AxisType.Auto,))


def compile_for(chip, function, *shapes):
    """`function` compiled for a chip, its arguments split along their first axis over the devices: `(lowered, compiled)`."""

    def placed(shape):
        axes = PartitionSpec("batch") if shape.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh(chip), axes))

    shapes = jax.tree.map(placed, shapes)
    with jax.sharding.use_abstract_mesh(mesh(chip).abstract_mesh):
        traced = jax.jit(function).trace(*shapes)
    lowered = traced.lower(lowering_platforms=("tpu",))
    return lowered, lowered.compile()


def kernels(chip, function, *shapes):
    """How many kernels the compiled function calls (counted before compilation: the text after it cannot always be printed)."""
    lowered, _ = compile_for(chip, function, *shapes)
    return lowered.as_text().count("@tpu_custom_call")


def collectives(chip, function, *shapes):
    """Kinds of collectives in the compiled function."""
    text = compile_for(chip, function, *shapes)[1].as_text()
    return [
        kind
        for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
        if kind in text
    ]
