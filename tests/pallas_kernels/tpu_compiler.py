# SPDX-License-Identifier: Apache-2.0
"""Compiles a function for a TPU that is only described: libtpu holds the compiler and needs no chip."""

import functools
import importlib.util
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies

# Every generation that the kernels promise to compile for, each described with one chip's worth of cores.
TOPOLOGIES = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:1x1", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:1x1", {}),
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which holds the TPU compiler, is not installed"
)


@functools.cache
def _mesh(generation):
    # Nothing is asked of a machine that is not there, and other processes may use the compiler too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name, options = TOPOLOGIES[generation]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    return jax.sharding.Mesh(np.array(topology.devices[:1]), ("d",))


def compile_for(generation, function, *args):
    """The compiled program's text, for arguments given as `ShapeDtypeStruct`."""
    mesh = _mesh(generation)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("tpu",)).compile().as_text()
