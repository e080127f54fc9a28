# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models with the patterns used on them: what kernels are compiled for and benchmarks name."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
    """One use of block-sparse attention.

    Attributes:
      batch, queries, keys, heads, kv_heads, width: sizes of the arrays.
      block_q, block_k, capacity: of the lists; lists: heads that have lists of their own.
      causal, key_bias, sinks: what the call uses; tiles: distinct partial tiles.
    """

    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int
    block_q: int
    block_k: int
    capacity: int
    batch: int = 1
    lists: int = 1
    causal: bool = False
    key_bias: bool = False
    sinks: bool = False
    tiles: int = 0
    dtype: str = "bfloat16"


SPECS = {
    # Llama-3.1-8B prefill with block top-k lists for each key head.
    "llama_8b_topk": Spec(4096, 4096, 32, 8, 128, 128, 128, capacity=8, lists=8, causal=True),
    # GPT-OSS style sinks and a sliding window.
    "gpt_oss_window": Spec(2048, 2048, 64, 8, 64, 128, 128, capacity=3, causal=True, sinks=True, tiles=2),
    # Wan2.1-14B with Radial attention, cut to two latent frames of 3,840 tokens to keep the compile short.
    "wan_radial": Spec(7680, 7680, 40, 40, 128, 128, 128, capacity=60),
    # BigBird-base: blocks of 64 are doubled for the matrix unit; removed tokens by bias, odd length.
    "bigbird_base": Spec(3990, 3990, 12, 12, 64, 128, 128, capacity=8, batch=2, lists=12, key_bias=True),
    # Blocks of 512 at a quarter of the density.
    "blocks_512": Spec(4096, 4096, 8, 8, 128, 512, 512, capacity=2, lists=8, causal=True),
    "blocks_512_wide": Spec(2048, 2048, 8, 8, 256, 512, 512, capacity=2, lists=8, causal=True),
    # Llama-3.1-8B on 262,144 tokens, a quarter of the heads a device: a head's keys and values are 128 MiB, which no TPU holds.
    "llama_8b_long": Spec(2**18, 2**18, 8, 2, 128, 512, 512, capacity=32, lists=2, causal=True),
    # Float32 keeps all bits of its operands.
    "float32": Spec(1024, 1024, 4, 4, 64, 128, 128, capacity=4, dtype="float32"),
}
