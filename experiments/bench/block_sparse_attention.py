# SPDX-License-Identifier: Apache-2.0
"""Attention over listed key blocks against dense attention, at five densities, the making of the lists included.

Lists are the best blocks of random scores, different for every head. `implied` is the inverse of the listed share of blocks,
`realised` the time of dense attention (`jax.nn.dot_product_attention`; cuDNN's on a GPU, where it takes the dtype) over ours,
and `overhead` the time of making the lists over ours. `realised_best` is against the faster of that and this codebase's own
dense attention. `sparse_cost` is our time over density x the time of dense attention: 1 if listed blocks cost what dense ones
do; `--gradients` adds the same of forward and backward pass together. `--peer` also times PyTorch's FlexAttention with the same
blocks (`experiments/peers/torch_flex_attention.py`; `--peer-python` names an interpreter that has PyTorch): `peer_ratio` is our
time over its, and `sparse_cost_best` the cost beside the faster of the dense attentions, PyTorch's among them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import measure
from experiments.bench.flags import floats
from pallas_kernels.biased_flash_attention import biased_attention
from pallas_kernels.block_sparse_attention import block_sparse_attention, from_scores

_PEER = pathlib.Path(__file__).parents[1] / "peers" / "torch_flex_attention.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--batch", type=int, default=1, help="(default %(default)s)")
    parser.add_argument("--length", type=int, default=4096, help="queries and keys (default %(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(default %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=0, help="heads of keys; as many as heads when 0 (default)")
    parser.add_argument("--width", type=int, default=64, help="of a head (default %(default)s)")
    parser.add_argument("--block", type=int, default=128, help="of queries and keys (default %(default)s)")
    parser.add_argument(
        "--density",
        type=floats,
        default=(1.0, 0.5, 0.25, 0.125, 0.0625),
        help="shares of blocks listed (five by default)",
    )
    parser.add_argument("--causal", action="store_true", help="mask later keys, in the dense attention too")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--implementation", default=None, help="of ours; the best available when not given")
    parser.add_argument("--gradients", action="store_true", help="also time forward and backward pass together")
    parser.add_argument("--peer", action="store_true", help="also time FlexAttention in PyTorch")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has PyTorch (default: this one)"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each density.

    Raises:
      ValueError: the peer cannot run.
    """
    keys, dtype = jax.random.split(jax.random.key(0), 4), jnp.dtype(options.dtype)
    heads = (options.heads, *[options.kv_heads or options.heads] * 2)
    query, key, value = (
        jax.random.normal(k, (options.batch, options.length, h, options.width), dtype)
        for k, h in zip(keys[:3], heads, strict=True)
    )
    blocks = -(-options.length // options.block)
    scores = jax.random.normal(keys[3], (options.batch, options.heads, blocks, blocks))
    for density in options.density:
        yield _row(options, (query, key, value), scores, max(1, round(density * blocks)))


def _row(options: argparse.Namespace, arrays: tuple[Any, ...], scores: Any, listed: int) -> dict[str, Any]:
    """One density.

    Raises:
      ValueError: the peer cannot run.
    """
    sizes = dict(queries=options.length, keys=options.length, block_q=options.block, block_k=options.block)

    def lists(scores: Any) -> Any:
        if options.causal:
            scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
        return from_scores(scores, listed, **sizes)

    index = jax.jit(lists)(scores)
    attend = {"causal": options.causal, "implementation": options.implementation}
    peer = dense_peer(options.dtype)

    def dense(*a: Any) -> Any:
        return jax.nn.dot_product_attention(*a, is_causal=options.causal, implementation=peer)

    def sparse(*a: Any) -> Any:
        return block_sparse_attention(*a, **attend)

    functions = {
        "dense": measure.compiled_call(dense, *arrays),
        "own_dense": measure.compiled_call(lambda *a: biased_attention(*a, causal=options.causal), *arrays),
        "sparse": measure.compiled_call(sparse, *arrays, index),
        "lists": measure.compiled_call(lists, scores),
    }
    if options.gradients:
        functions["dense_both"] = measure.compiled_call(both(dense), *arrays)
        functions["sparse_both"] = measure.compiled_call(both(sparse), *arrays, index)
    times = measure.interleaved(functions, repeats=options.repeats, calls=measure.kernel_calls())
    medians = {name: time.median for name, time in times.items()}
    density = float(index.density())
    implied, realised = 1 / density, medians["dense"] / medians["sparse"]
    costs = {"sparse_cost": medians["sparse"] / (density * medians["dense"])}
    if options.gradients:
        costs["sparse_cost_both"] = medians["sparse_both"] / (density * medians["dense_both"])
    heads = f"{arrays[0].shape[2]}/{arrays[1].shape[2]}"
    return {
        "shape": f"{options.batch}x{options.length} {heads} heads of {options.width}, blocks of {options.block}",
        "device": measure.device_name(),
        "dtype": options.dtype,
        "causal": options.causal,
        "density": round(density, 4),
        "implied": round(implied, 4),
        "realised": round(realised, 4),
        "realised_best": round(min(medians["dense"], medians["own_dense"]) / medians["sparse"], 4),
        "realised_share": round(realised / implied, 4),
        "dense_by": peer or "xla",
        **{name: round(cost, 4) for name, cost in costs.items()},
        "overhead": round(medians["lists"] / medians["sparse"], 4),
        "milliseconds": {n: [round(1e3 * t, 3) for t in (v.low, v.median, v.high)] for n, v in times.items()},
        "repeats": options.repeats,
        **(_beside(medians, density, _peer(options, np.asarray(index.block_mask()[0]))) if options.peer else {}),
    }


def _beside(medians: dict[str, float], density: float, peer: dict[str, Any]) -> dict[str, Any]:
    """What a peer's times say of our `medians`."""
    theirs = {name: 1e-3 * time for name, time in peer["milliseconds"].items()}
    ratios = {"peer_ratio": medians["sparse"] / theirs["sparse"]}
    if {"sparse_both"} <= medians.keys() & theirs.keys():
        ratios["peer_ratio_both"] = medians["sparse_both"] / theirs["sparse_both"]
    best = min(medians["dense"], medians["own_dense"], theirs["dense"])
    ratios["sparse_cost_best"] = medians["sparse"] / (density * best)
    return {name: round(ratio, 4) for name, ratio in ratios.items()} | {"peer": peer}


def dense_peer(dtype: str) -> str | None:
    """The dense attention to compare with: cuDNN's on a GPU, which takes 16-bit numbers."""
    return "cudnn" if jax.default_backend() == "gpu" and jnp.dtype(dtype).itemsize == 2 else None


def both(function: Callable[..., Any]) -> Callable[..., Any]:
    """The output and the gradients of query, key and value, with the output as its own cotangent."""

    def run(query: Any, key: Any, value: Any, *rest: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: function(*arrays, *rest), query, key, value)
        return out, pull(out)

    return run


def _peer(options: argparse.Namespace, mask: np.ndarray) -> dict[str, Any]:
    """Milliseconds of FlexAttention with the listed blocks `mask [H, R, C]`, and of making its mask.

    Raises:
      ValueError: it cannot run.
    """
    command = [options.peer_python, str(_PEER), f"--dtype={options.dtype}"]
    command += [
        f"--{name}={getattr(options, name)}" for name in ("batch", "length", "heads", "width", "block", "repeats")
    ]
    command += [f"--kv-heads={options.kv_heads or options.heads}", *(["--causal"] if options.causal else [])]
    with tempfile.TemporaryDirectory(prefix="adaptive_peer_") as folder:
        path = pathlib.Path(folder) / "blocks"
        path.write_bytes(mask.astype(np.uint8).tobytes())
        done = subprocess.run([*command, f"--blocks={path}"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the peer failed: {' '.join(command)}\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
