# SPDX-License-Identifier: Apache-2.0
"""Prints, as one JSON object, how far kernels on 4 fake CPU devices are from the same on one, values and gradients.

python tests/pallas_kernels/on_devices.py
"""

from __future__ import annotations

import functools
import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adaptive.width import acm
from pallas_kernels.biased_flash_attention import attention_column_stats, biased_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention, from_block_mask
from pallas_kernels.position_bias import PositionBias

B, N, H, D = 4, 40, 2, 8
RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


QUERY, KEY, VALUE = (draw(B, N, H, D) for _ in range(3))
POSITIONS = np.sort(RNG.integers(0, 3 * N, (B, N)), axis=1).astype(np.int32)
MASK = RNG.random((B, 1, 3, 3)) < 0.7


def attention(query, key, value, key_bias, table):
    bias = PositionBias(table, POSITIONS, POSITIONS)
    return biased_attention(query, key, value, key_bias=key_bias, bias=bias, implementation="gpu_interpret")


def statistics(query, key, weight, table):
    bias = PositionBias(table, POSITIONS, POSITIONS)
    return attention_column_stats(query, key, query_weight=weight, bias=bias, implementation="gpu_interpret")


def sparse(shared, query, key, value, sinks):
    mask = MASK[:1] if shared else MASK
    index = from_block_mask(mask, queries=N, keys=N, block_q=16, block_k=16)
    return block_sparse_attention(query, key, value, index, sinks=sinks, implementation="gpu_interpret")


def learners(rows, up, bias, down):
    chosen = (np.arange(N)[:, None] % 5 > np.arange(4)).astype(np.float32)
    return acm.skipping(rows, jnp.asarray(chosen), up, bias, down, activation="gelu_tanh", least=1)


# Arguments that a batch is divided of, and those that are whole everywhere.
CASES = {
    "attention with positions": (attention, (QUERY, KEY, VALUE, draw(B, N)), (draw(32, H),)),
    "statistics with positions": (statistics, (QUERY, KEY, draw(B, N)), (draw(32, H),)),
    "lists of each row": (functools.partial(sparse, False), (QUERY, KEY, VALUE), (draw(H),)),
    "shared lists": (functools.partial(sparse, True), (QUERY, KEY, VALUE), (draw(H),)),
    "learners": (learners, (draw(N, 16),), (draw(16, 32), draw(32), draw(32, 16))),
}


def distance(name: str) -> dict[str, float]:
    """The largest difference of the outputs and of each gradient."""
    function, divided, whole = CASES[name]
    arguments = (*divided, *whole)
    cotangent = RNG.normal(size=jax.eval_shape(function, *arguments).shape).astype(np.float32)

    def loss(*arguments):
        out = function(*arguments)
        return jnp.sum(out * cotangent), out

    run = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True))
    expected = run(*arguments)
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        rows, all_ = (NamedSharding(mesh, spec) for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec()))
        placed = [jax.device_put(x, rows) for x in divided] + [jax.device_put(x, all_) for x in whole]
        traced = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True))
        found = traced(*placed)
    far = jax.tree.map(lambda one, other: float(np.max(np.abs(one - other))), jax.device_get(found), expected)
    return {"out": far[1], **{str(place): value for place, value in enumerate(far[0])}}


if __name__ == "__main__":
    print(json.dumps({name: distance(name) for name in CASES}))
