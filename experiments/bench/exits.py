# SPDX-License-Identifier: Apache-2.0
"""Early exits of a ViT: images that are sure of their class leave, and later blocks run on those that are left.

Weights are random and the threshold is a quantile of confidences, so that about `--share` of the images leave in the first
half; what a threshold costs in quality is for trained models. `implied` counts the blocks and heads that each image itself
needs. `all` is the time of the model with its exits when no image leaves, over that of the plain ViT.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adaptive import flops
from adaptive.depth import exits
from experiments import measure
from experiments.bench import vit
from experiments.bench.flags import floats
from layers.vit_depth import ExitViT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    vit.add_arguments(parser, "S/16")
    parser.add_argument(
        "--share", type=floats, default=(0.5, 0.75), help="of images that leave by the middle (default 0.5,0.75)"
    )


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each shape, batch size and share."""
    for variant in options.variant.split(","):
        plain = vit.dense_model(variant, options)
        sizes = dict(num_classes=plain.num_classes, image_size=plain.image_size, dtype=plain.dtype)
        model = ExitViT.named(variant, **sizes)
        params = _sure(vit.random_params(model)["params"], model.width)
        for batch in options.batch:
            images = jax.random.normal(jax.random.key(0), (batch, *model.image_size, model.channels))
            yield from _rows(variant, plain, model, params, images, options)


def _rows(
    variant: str, plain: Any, model: ExitViT, params: Any, images: Any, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    batch = images.shape[0]
    kept = {name: params[name] for name in params if not name.startswith(("exit_", "ensemble_"))}
    dense = measure.compiled_call(lambda p, x: plain.apply({"params": p}, x)[0], kept, images)
    leave = jax.jit(model.leave_early)
    logits = jax.jit(lambda p, x: model.apply({"params": p}, x)[1]["exit_logits"])(params, images)
    confidence = np.asarray(exits.max_probability(logits))[:, : model.depth // 2].max(axis=1)
    macs = np.asarray(model.exit_macs())
    for share in options.share:
        # A little lower, as another program rounds otherwise.
        threshold = float(np.quantile(confidence, 1 - share, method="lower")) * (1 - 1e-6)
        calls = {
            "dense": dense,
            "exits": functools.partial(leave, params, images, threshold),
            "all": functools.partial(leave, params, images, 2.0),
        }
        times = measure.interleaved(calls, repeats=options.repeats)
        left = np.asarray(leave(params, images, threshold)[1])
        implied = flops.count(plain).macs / macs[left].mean()
        realised = times["dense"].median / times["exits"].median
        yield {
            "shape": f"ViT-{variant} {batch}x{model.num_tokens}, {share:g} leave by the middle",
            "device": measure.device_name(),
            "dtype": options.dtype,
            "implied": round(float(implied), 4),
            "realised": round(realised, 4),
            "all": round(times["all"].median / times["dense"].median, 4),
            "layers": round(float((left + 1).mean()), 3),
            "milliseconds": measure.milliseconds(times),
            "repeats": options.repeats,
        }


def _sure(params: Any, width: int) -> Any:
    """The parameters with exits whose predictions differ from image to image."""
    heads = {name: own for name, own in params.items() if name.startswith("exit_")}
    return {**params, **measure.random_like(heads, jax.random.key(1), deviation=2.4 / math.sqrt(width))}
