# SPDX-License-Identifier: Apache-2.0
"""A Duo-LLM whose tokens take big, small or no modules, each run on its own rows, against big modules everywhere.

`implied` is the ratio of multiply-accumulates of the whole model, attention and head included, `realised` that of times.
`masked` is the time of the form of training, in which both modules run for all rows, over that of the dense model. Weights and
paths are random: time does not depend on which tokens share a module. Rows with `decoded` are of decoding with a cache, where a
router with random weights decides, its threshold set for the share of big modules.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta

from adaptive import flops
from adaptive.width import duo
from experiments import measure
from experiments.bench import decoder
from experiments.bench.flags import integers
from layers.duo_lm import DuoLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--layers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--width", type=int, default=512, help="of the residual stream (default %(default)s)")
    parser.add_argument("--big", type=int, default=2_048, help="inner width of the big modules (default %(default)s)")
    parser.add_argument("--small", type=int, default=128, help="inner width of the small modules (default %(default)s)")
    parser.add_argument("--batch", type=integers, default=(1, 8), help="batch sizes, comma separated (default 1,8)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens to decode (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size and mixture of choices."""
    model = DuoLM(width=options.width, layers=options.layers, heads=8, big=options.big, small=options.small)
    one = jnp.zeros((1, options.tokens), jnp.int32)
    shapes = meta.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), one, method="soft")))["params"]
    params = measure.random_like(shapes, jax.random.key(1))
    forwards = {
        "compacted": jax.jit(lambda params, ids, paths: model.apply({"params": params}, ids, paths, compact=True)),
        "masked": jax.jit(lambda params, ids, paths: model.apply({"params": params}, ids, paths)),
        "dense": jax.jit(lambda params, ids, _: model.apply({"params": params}, ids, method="all_big")),
    }
    for batch in options.batch:
        ids = jax.random.randint(jax.random.key(2), (batch, options.tokens), 3, 259)
        for shares in ((0.0, 0.5, 0.5), (0.2, 0.5, 0.3), (0.0, 0.75, 0.25), (0.5, 0.0, 0.5), (0.0, 1.0, 0.0)):
            yield _row(options, model, forwards, params, ids, shares)
        for share in (0.25, 0.5):
            yield _decode_row(options, model, params, ids, share)


def _row(
    options: argparse.Namespace, model: DuoLM, forwards: Any, params: Any, ids: Any, shares: tuple[float, ...]
) -> dict[str, Any]:
    paths = duo.random_paths(jax.random.key(3), (*ids.shape, model.layers), shares)
    calls = {name: functools.partial(forward, params, ids, paths) for name, forward in forwards.items()}
    times = measure.interleaved(calls, repeats=options.repeats)
    sizes = {"batch": ids.shape[0], "tokens": ids.shape[1]}
    uses = {name: float(jnp.mean(jnp.sum(paths == choice, axis=-1))) for name, choice in (("big", 2), ("small", 1))}
    macs = [flops.Count(model.macs(**sizes)).macs, flops.Count(model.macs(**sizes, **uses)).macs]
    return {
        "shape": f"{ids.shape[0]}x{ids.shape[1]} tokens, {model.layers} layers of width {model.width}",
        "part": "forward, {:g} skip, {:g} small, {:g} big".format(*shares),
        "shares": dict(zip(duo.CHOICES, shares, strict=True)),
        "device": measure.device_name(),
        "dtype": "float32",
        "implied": round(macs[0] / macs[1], 3),
        "realised": round(times["dense"].median / times["compacted"].median, 3),
        "masked": round(times["masked"].median / times["dense"].median, 3),
        "milliseconds": measure.milliseconds(times),
    }


def _decode_row(options: argparse.Namespace, model: DuoLM, params: Any, ids: Any, share: float) -> dict[str, Any]:
    steps, batch = options.max_length, ids.shape[0]
    scores = jax.jit(functools.partial(model.apply, method="routed"))({"params": params}, ids)[2]
    models = {"dense": -math.inf, "routed": float(duo.calibrate(scores, share))}
    calls = {
        name: decoder.Decode(model.clone(threshold=threshold), {"params": params}, ids, steps, temperature=1.0)
        for name, threshold in models.items()
    }
    times = measure.interleaved(calls, repeats=options.repeats)
    big = float(calls["routed"].tokens.mean(axis=1).sum() / steps)
    sizes = {"batch": batch, "tokens": 1, "keys": options.tokens + steps}
    macs = [flops.Count(model.macs(**sizes, **uses)).macs for uses in ({}, {"big": big, "small": model.layers - big})]
    return {
        "shape": f"{batch}x{options.tokens}+{steps} tokens, {model.layers} layers of width {model.width}",
        "part": f"decoding, {share:g} big",
        "decoded": steps,
        "share": share,
        "big": round(big / model.layers, 3),
        "device": measure.device_name(),
        "dtype": "float32",
        "implied": round(macs[0] / macs[1], 3),
        "realised": round(times["dense"].median / times["routed"].median, 3),
        "milliseconds": measure.milliseconds(times),
    }
