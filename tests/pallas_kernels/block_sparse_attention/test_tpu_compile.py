# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention's kernels, forward and backward, compile for every TPU generation at their named shapes."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_sparse_attention import BlockIndex, block_sparse_attention
from pallas_kernels.block_sparse_attention.specs import SPECS
from tests.pallas_kernels.tpu_compiler import CHIPS, compile_for


def _arguments(spec):
    def array(*shape, dtype=spec.dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    lists = (1, spec.lists, -(-spec.queries // spec.block_q))
    tiles = (array(*lists, spec.capacity, dtype="int32"), array(spec.tiles, spec.block_q, spec.block_k, dtype="bool"))
    index = BlockIndex(
        array(*lists, spec.capacity, dtype="int32"),
        array(*lists, dtype="int32"),
        *(tiles if spec.tiles else (None, None)),
        *(spec.queries, spec.keys, spec.block_q, spec.block_k),
    )
    arrays = {
        "query": array(spec.batch, spec.queries, spec.heads, spec.width),
        "key": array(spec.batch, spec.keys, spec.kv_heads, spec.width),
        "value": array(spec.batch, spec.keys, spec.kv_heads, spec.width),
        "key_bias": array(spec.batch, spec.keys, dtype="float32") if spec.key_bias else None,
        "sinks": array(spec.heads, dtype="float32") if spec.sinks else None,
    }
    return {name: leaf for name, leaf in arrays.items() if leaf is not None}, index


@pytest.mark.parametrize("generation", CHIPS)
@pytest.mark.parametrize("name", SPECS)
def test_forward_and_backward_compile(name, generation):
    spec = SPECS[name]
    arrays, index = _arguments(spec)
    attend = functools.partial(block_sparse_attention, causal=spec.causal, implementation="tpu")

    def gradients(arrays, index):
        return jax.grad(lambda arrays: jnp.sum(attend(index=index, **arrays).astype(jnp.float32) ** 2))(arrays)

    _, compiled = compile_for(generation, gradients, arrays, index)
    text = compiled.as_text()
    for kernel in ("forward", "query_gradient", "key_gradients"):
        assert f"block_sparse_attention_{kernel}" in text
