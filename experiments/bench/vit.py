# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of token reduction on a ViT share: models with random weights, timed calls, one row.

Time does not depend on the weights. `overhead` is the time of one matching and merging, at the length of the first layer that
reduces, over the time of one dense block.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from adaptive import flops
from adaptive.tokens import Signals, TokenSet
from experiments import measure
from experiments.bench.flags import integers
from layers.hooks import Reduce
from layers.vit import Block, ViT


def add_arguments(parser: argparse.ArgumentParser, variants: str) -> None:
    """Flags that these benchmarks share."""
    parser.add_argument(
        "--variant", default=variants, help="published ViT shapes, comma separated (default %(default)s)"
    )
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default %(default)s: 197 tokens at /16)")
    parser.add_argument("--batch", type=integers, default=(8,), help="batch sizes, comma separated (default 8)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def dense_model(variant: str, options: argparse.Namespace) -> ViT:
    """The published shape with 1,000 classes."""
    return ViT.named(variant, num_classes=1000, image_size=(options.image_size,) * 2, dtype=jnp.dtype(options.dtype))


def random_params(model: ViT) -> Any:
    """Variables of the model, drawn without its initialisers; matrices in the dtype of the computation."""
    image = jax.ShapeDtypeStruct((1, *model.image_size, model.channels), jnp.float32)
    shapes = meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))
    return measure.random_like(shapes, jax.random.key(0))


def row(label: str, model: ViT, hook: Reduce, params: Any, batch: int, repeats: int) -> dict[str, Any]:
    """Times the dense model, the same under `hook`, one dense block and one reduction, in turn."""
    reduced = model.clone(hooks=(hook,))
    images = jax.random.normal(jax.random.key(0), (batch, *model.image_size, model.channels))
    block, reduction, arguments = _parts(model, hook, batch)
    rngs = {"reduction": jax.random.key(0)}
    functions = {
        "dense": measure.compiled_call(lambda p, x: model.apply(p, x)[0], params, images),
        "reduced": measure.compiled_call(lambda p, x: reduced.apply(p, x, rngs=rngs)[0], params, images),
        "block": measure.compiled_call(block, *arguments),
        "reduction": measure.compiled_call(reduction, arguments[1]),
    }
    times = measure.interleaved(functions, repeats=repeats, warmup=2)
    macs = [flops.count(model, batch=batch, counts=c, place=hook.place).macs for c in (None, hook.counts)]
    implied, realised = macs[0] / macs[1], times["dense"].median / times["reduced"].median
    return {
        "shape": f"{label} {batch}x{model.num_tokens}",
        "device": measure.device_name(),
        "dtype": jnp.dtype(model.dtype).name,
        "implied": round(implied, 4),
        "realised": round(realised, 4),
        "realised_share": round(realised / implied, 4),
        "overhead": round(times["reduction"].median / times["block"].median, 4),
        "images_per_second": {name: round(batch / times[name].median, 3) for name in ("dense", "reduced")},
        "milliseconds": measure.milliseconds(times),
        "tokens_after_layers": list(hook.counts),
        "gmacs": [round(m / 1e9, 3) for m in macs],
        "repeats": repeats,
    }


def _parts(model: ViT, hook: Reduce, batch: int) -> tuple[Any, Any, tuple[Any, Any]]:
    """One dense block, one reduction of its tokens, and the block's arguments."""
    key = jax.random.key(1)
    features = jax.random.normal(key, (batch, model.num_tokens, model.width), model.dtype)
    tokens = TokenSet.create(features)
    block = Block(model.heads, model.mlp_dim, dtype=model.dtype)
    params = measure.random_like(meta.unbox(jax.eval_shape(block.init, key, tokens)), key)
    layer = next(index for index in range(model.depth) if hook.acts(index, model.num_tokens))

    def reduction(tokens: TokenSet) -> TokenSet:
        signals = {
            "keys": tokens.features[..., : model.width // model.heads],
            "cls_attention": tokens.features[..., 0],
            "rng": key,
        }
        found = Signals(**{name: signals[name] for name in hook.signals}, cls_token=model.has_class_token, layer=layer)
        return hook(tokens, found).apply(tokens)

    return lambda p, t: block.apply(p, t)[0], reduction, (params, tokens)
