# SPDX-License-Identifier: Apache-2.0
"""Prints, as one JSON object, how far attention kernels on 4 fake CPU devices are from plain JAX on one.

python tests/pallas_kernels/sharded_attention.py
"""

from __future__ import annotations

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.biased_flash_attention import attention_column_stats, biased_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention, from_block_mask
from pallas_kernels.position_bias import PositionBias

B, N, H, D = 4, 40, 2, 8


def run(implementation, arrays, table, positions, shared, lists):
    """Outputs and gradients of all public functions; positions of queries and lists differ by row, those of keys do not."""

    def loss(arrays, table):
        query, key, value, key_bias = arrays
        own = {"key_bias": key_bias, "implementation": implementation}
        bias = PositionBias(table, positions, shared)
        out = biased_attention(query, key, value, bias=bias, **own)
        stats = attention_column_stats(query, key, bias=bias, **own)
        sparse = block_sparse_attention(query, key, value, lists, softmax="off_by_one", **own)
        return sum(jnp.sum(x**2) for x in (out, stats, sparse)), {"out": out, "stats": stats, "sparse": sparse}

    (arrays, table), outs = jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays, table)
    names = ("query", "key", "value", "key_bias")
    return outs | dict(zip(names, arrays, strict=True)) | {"table": table}


def main() -> None:
    """Runs both and prints."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((B, N, H, D),) * 3 + ((B, N),)]
    positions = np.sort(rng.choice(200, (B, N)), axis=1).astype(np.int32)
    sizes = dict(queries=N, keys=N, block_q=128, block_k=128)
    lists = from_block_mask(rng.random((B, H, 1, 1)) < 0.7, **sizes)
    given = (arrays, rng.normal(size=(32, H)).astype(np.float32), positions, positions[:1], lists)
    expected = jax.jit(lambda *given: run("xla", *given))(*given)
    mesh = Mesh(np.array(jax.devices()), ("batch",), axis_types=(AxisType.Auto,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        sharded = jax.jit(
            lambda *given: run("gpu_interpret", *given), in_shardings=([rows] * 4, whole, rows, whole, rows)
        )
        found = sharded(*given)
    print(
        json.dumps(
            {
                name: {
                    "apart": float(np.max(np.abs(found[name] - expected[name]))),
                    "divided": not found[name].sharding.is_fully_replicated,
                }
                for name in found
            }
        )
    )


if __name__ == "__main__":
    main()
