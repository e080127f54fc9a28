# SPDX-License-Identifier: Apache-2.0
"""ToMe on a ViT: implied and realised speedup over the dense model, and the time of the reduction itself.

`overhead` is the time of one matching and merging at full length over the time of one dense block. Weights are random:
time does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from adaptive import budgets, flops, registry
from adaptive.tokens import Signals, TokenSet
from experiments import measure
from experiments.tasks.models import with_reduction
from layers.vit import Block, ViT


def integers(text: str) -> tuple[int, ...]:
    """Reads "8,13" as (8, 13)."""
    return tuple(int(part) for part in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--variant", default="B/16", help="published ViT shape (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default %(default)s: 197 tokens at /16)")
    parser.add_argument("--batch", type=integers, default=(8,), help="batch sizes, comma separated (default 8)")
    parser.add_argument("--r", type=integers, default=(13,), help="tokens merged a layer, comma separated (default 13)")
    parser.add_argument("--method", default="tome", help="any registered token reduction (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size and r."""
    dense = ViT.named(
        options.variant,
        num_classes=1000,
        image_size=(options.image_size,) * 2,
        dtype=jnp.dtype(options.dtype),
    )
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, options.image_size, options.image_size, 3), jnp.float32)
    params = measure.random_like(meta.unbox(jax.eval_shape(dense.init, key, image)), key)
    for batch in options.batch:
        images = jax.random.normal(key, (batch, *image.shape[1:]))
        for removed in options.r:
            yield _row(options, dense, params, images, removed)


def _row(options: argparse.Namespace, dense: ViT, params: Any, images: Any, removed: int) -> dict[str, Any]:
    reduced = with_reduction(dense, {"method": options.method, "r": removed, "clamp": True})
    counts = reduced.hooks[0].counts
    block, reduction, arguments = _parts(options, dense, images.shape[0], counts[0])
    functions = {
        "dense": _call(lambda p, x: dense.apply(p, x)[0], params, images),
        "reduced": _call(lambda p, x: reduced.apply(p, x, rngs={"reduction": jax.random.key(0)})[0], params, images),
        "block": _call(block, *arguments),
        "reduction": _call(reduction, arguments[1]),
    }
    times = measure.interleaved(functions, repeats=options.repeats, warmup=2)
    macs = [flops.count(dense, batch=images.shape[0], counts=c).macs for c in (None, counts)]
    implied, realised = macs[0] / macs[1], times["dense"].median / times["reduced"].median
    return {
        "shape": f"ViT-{options.variant} {images.shape[0]}x{dense.num_tokens} {options.method} r={removed}",
        "device": measure.device_name(),
        "dtype": options.dtype,
        "implied": round(implied, 4),
        "realised": round(realised, 4),
        "realised_share": round(realised / implied, 4),
        "overhead": round(times["reduction"].median / times["block"].median, 4),
        "images_per_second": {name: round(images.shape[0] / times[name].median, 3) for name in ("dense", "reduced")},
        "milliseconds": {name: [round(1e3 * t, 3) for t in (v.low, v.median, v.high)] for name, v in times.items()},
        "tokens_after_layers": list(counts),
        "gmacs": [round(m / 1e9, 3) for m in macs],
        "repeats": options.repeats,
    }


def _parts(options: argparse.Namespace, dense: ViT, batch: int, survivors: int) -> tuple[Any, Any, tuple[Any, Any]]:
    """One dense block, one reduction of its tokens, and the block's arguments."""
    key = jax.random.key(1)
    features = jax.random.normal(key, (batch, dense.num_tokens, dense.width), jnp.dtype(options.dtype))
    tokens = TokenSet.create(features)
    block = Block(dense.heads, dense.mlp_dim, dtype=dense.dtype)
    params = measure.random_like(meta.unbox(jax.eval_shape(block.init, key, tokens)), key)
    method = registry.get(options.method)
    budget = budgets.check(survivors, dense.num_tokens)
    needs = registry.describe(options.method).signals

    def reduction(tokens: TokenSet) -> TokenSet:
        signals = {
            "keys": tokens.features[..., : dense.width // dense.heads],
            "cls_attention": tokens.features[..., 0],
            "rng": key,
        }
        found = Signals(**{name: signals[name] for name in needs}, cls_token=dense.has_class_token)
        return method(tokens, found, budget).apply(tokens)

    return lambda p, t: block.apply(p, t)[0], reduction, (params, tokens)


def _call(function: Any, *arguments: Any) -> Any:
    """A compiled call of `function` on `arguments`."""
    compiled = jax.jit(function)
    return lambda: compiled(*arguments)
