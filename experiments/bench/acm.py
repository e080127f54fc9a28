# SPDX-License-Identifier: Apache-2.0
"""ACM's learners in place of the feed-forward layer and the four projections of a block: implied and realised speedup.

`implied` is the dense layers' multiply-adds over those of the gates and of the learners that run; `realised` the measured
speedup, gates, sorting and putting back included. Weights are random; the last bias of each gate is set so that tokens get
the asked share of learners on average, and differ in how many.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from experiments import measure
from experiments.bench.flags import floats, integers
from layers.acm import AcmParts, Module, gate_logits, modules
from layers.parts import Parts
from layers.vit import SHAPES

# What is timed: the layers that become learners, one after the other as a block has them, without attention itself.
LAYERS = ("query", "key", "value", "out", "mlp")


class Layers(nn.Module):
    """The projections and the feed-forward layer of a block, each applied to the same tokens; their results in a list."""

    heads: int
    mlp_dim: int
    parts: Parts
    names: tuple[str, ...] = LAYERS
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any) -> list[Any]:
        """`x [B, N, D]`."""
        width = x.shape[-1]
        split = (self.heads, width // self.heads)
        results = []
        for name in self.names:
            if name == "mlp":
                results.append(self.parts.mlp(self.mlp_dim, name=name, dtype=self.dtype)(x))
            elif name == "out":
                axes = ("heads", "head_dim", "embed")
                linear = self.parts.projection(axes, name=name, dtype=self.dtype)
                results.append(linear(x.reshape(*x.shape[:-1], *split), (width,)))
            else:
                axes = ("embed", "heads", "head_dim")
                results.append(self.parts.projection(axes, name=name, dtype=self.dtype)(x, split))
        return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    parser.add_argument("--variant", default="B", choices=sorted(SHAPES), help="ViT shape (default %(default)s)")
    parser.add_argument("--batch", type=integers, default=(8,), help="images, comma separated (default 8)")
    parser.add_argument("--tokens", type=int, default=197, help="tokens an image (default %(default)s)")
    parser.add_argument("--learners", type=int, default=4, help="learners a module (default %(default)s)")
    parser.add_argument("--share", type=floats, default=(0.5,), help="mean shares of learners (default 0.5)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--implementation", default=None, help="of the staircase kernel (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each function (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each batch size and share, for the feed-forward layer, the projections, and both."""
    for batch in options.batch:
        for share in options.share:
            for part, names in (("mlp", ("mlp",)), ("projections", LAYERS[:4]), ("mlp+projections", LAYERS)):
                yield _row(options, batch, share, part, names)


def _row(options: argparse.Namespace, batch: int, share: float, part: str, names: tuple[str, ...]) -> dict[str, Any]:
    width, _, heads, mlp_dim = SHAPES[options.variant]
    dtype = jnp.dtype(options.dtype)
    parts = AcmParts(learners=options.learners, implementation=options.implementation)
    dense, adaptive = (Layers(heads, mlp_dim, made_of, names, dtype) for made_of in (Parts(), parts))
    x = jax.random.normal(jax.random.key(0), (batch, options.tokens, width), dtype)
    params = {
        who: measure.random_like(meta.unbox(jax.eval_shape(model.init, jax.random.key(0), x)), jax.random.key(1))
        for who, model in (("dense", dense), ("acm", adaptive))
    }
    found = modules(_as_block(params["dense"]["params"]), parts)
    params["acm"], used = _with_share(params["acm"]["params"], found, parts, x, share)
    functions = {
        "dense": measure.compiled_call(dense.apply, params["dense"], x),
        "acm": measure.compiled_call(adaptive.apply, {"params": params["acm"]}, x),
    }
    times = measure.interleaved(functions, repeats=options.repeats, warmup=2)
    macs = sum(module.dense for module in found)
    spent = sum(module.gate + module.learner * used[module.path.split("/")[-1]] for module in found)
    implied, realised = macs / spent, times["dense"].median / times["acm"].median
    return {
        "part": part,
        "shape": f"ViT-{options.variant} {batch}x{options.tokens}, {options.learners} learners, {share:g} of them",
        "device": measure.device_name(),
        "dtype": options.dtype,
        "implied": round(implied, 4),
        "realised": round(realised, 4),
        "realised_share": round(realised / implied, 4),
        "learners_used": {name: round(value, 3) for name, value in used.items()},
        "milliseconds": measure.milliseconds(times),
        "repeats": options.repeats,
    }


def _as_block(params: Any) -> dict[str, Any]:
    """The parameters of `Layers` under the names that they have in a block."""
    attention = {name: value for name, value in params.items() if name != "mlp"}
    rest = {name: value for name, value in params.items() if name == "mlp"}
    return {"attention": attention} | rest if attention else rest


def _with_share(
    params: Any, found: tuple[Module, ...], parts: AcmParts, x: Any, share: float
) -> tuple[Any, dict[str, float]]:
    """Parameters whose gates give the share of learners on average, and the mean number that each module gives."""
    params, used = dict(params), {}
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    for module in found:
        name = module.path.split("/")[-1]
        logits = np.asarray(gate_logits(_as_block(params), module, parts, rows))
        # Random gates barely tell tokens apart; trained ones do.
        scale = 1 / max(float(logits.std()), 1e-9)
        slope, used[name] = _slope(scale * (logits - logits.mean(axis=0)), module.least, share * parts.learners)
        gate = dict(params[name]["learners"]["gate"])
        last = f"layer_{len(parts.gate_hidden)}"
        shift = slope * np.arange(logits.shape[1]) - scale * logits.mean(axis=0)
        bias = scale * gate[last]["bias"] + shift.astype(np.float32)
        gate[last] = {"kernel": scale * gate[last]["kernel"], "bias": bias}
        params[name] = {"learners": {**params[name]["learners"], "gate": gate}}
    return params, used


def _slope(logits: np.ndarray, least: int, wanted: float) -> tuple[float, float]:
    """What to add to each further learner's logit so that rows get `wanted` on average, and what they get."""
    low, high = -20.0, 20.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = float((logits + middle * np.arange(logits.shape[1])).argmax(axis=1).mean()) + least
        low, high = (middle, high) if mean < wanted else (low, middle)
    return middle, mean
