# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: `python -m experiments.bench NAME`. A benchmark is a function of flags that yields rows.

A row is a flat dict with at least `name`, `shape`, `device`, `dtype`, and where they apply `implied` (speedup that the
FLOPs imply), `realised` (measured speedup) and `overhead` (the method's own time as a share of one dense block's).
"""

from __future__ import annotations

from experiments.bench import (
    acm,
    autotune,
    biased_flash_attention,
    bipartite_match,
    block_sparse_attention,
    calm,
    card,
    compact,
    diffrate,
    duo,
    exits,
    generate,
    merge,
    mod,
    mrt5,
    oracle,
    ragged_prefix_mlp,
    sink_window,
    skipdecode,
    sparse_decode_attention,
    tome,
)

BENCHES = {
    "tome": tome,
    "diffrate": diffrate,
    "mrt5": mrt5,
    "acm": acm,
    "exits": exits,
    "generate": generate,
    "skipdecode": skipdecode,
    "mod": mod,
    "calm": calm,
    "sink_window": sink_window,
    "oracle": oracle,
    "duo": duo,
    "block_sparse_attention": block_sparse_attention,
    "biased_flash_attention": biased_flash_attention,
    "compact": compact,
    "bipartite_match": bipartite_match,
    "merge": merge,
    "ragged_prefix_mlp": ragged_prefix_mlp,
    "sparse_decode_attention": sparse_decode_attention,
    "card": card,
    "autotune": autotune,
}

__all__ = ["BENCHES"]
