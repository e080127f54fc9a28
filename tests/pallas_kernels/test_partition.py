# SPDX-License-Identifier: Apache-2.0
"""Attention kernels under automatic sharding: each device works its own rows, and the table's gradient is the sum of all."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.biased_flash_attention import biased_attention
from pallas_kernels.position_bias import PositionBias
from tests.pallas_kernels import tpu_compiler

ROOT = pathlib.Path(__file__).parents[2]


def test_attention_on_four_devices_is_that_of_one():
    script = pathlib.Path(__file__).with_name("sharded_attention.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"out", "stats", "sparse", "query", "key", "value", "key_bias", "table"}
    for name, row in found.items():
        assert row["apart"] < 2e-4, (name, row)
        assert row["divided"] == (name != "table")


def test_attention_compiles_for_four_chips_with_no_collective_but_the_sum_of_the_table_s_gradient():
    array = jax.ShapeDtypeStruct((8, 300, 4, 64), jnp.bfloat16)
    key_bias = jax.ShapeDtypeStruct((8, 300), jnp.float32)

    def run(query, key, value, key_bias, positions=None):
        def loss(query, key, value, key_bias, table):
            bias = None if positions is None else PositionBias(table, positions, positions)
            out = biased_attention(query, key, value, key_bias=key_bias, bias=bias, implementation="tpu")
            return out.astype(jnp.float32) ** 2

        table = jnp.ones((32, 4))
        out, pull = jax.vjp(loss, query, key, value, key_bias, table)
        return pull(out)

    assert tpu_compiler.collectives("4 x v5e", run, array, array, array, key_bias) == []
    positions = jax.ShapeDtypeStruct((8, 300), jnp.int32)
    assert tpu_compiler.collectives("4 x v5e", run, array, array, array, key_bias, positions) == ["all-reduce"]
