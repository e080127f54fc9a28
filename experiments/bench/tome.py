# SPDX-License-Identifier: Apache-2.0
"""ToMe on a ViT: implied and realised speedup over the dense model, and the time of the reduction itself.

`overhead` is the time of one matching and merging at full length over the time of one dense block. Weights are random:
time does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from experiments.bench import vit
from experiments.bench.flags import integers
from experiments.tasks.models import with_reduction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    vit.add_arguments(parser, "B/16")
    parser.add_argument("--r", type=integers, default=(13,), help="tokens merged a layer, comma separated (default 13)")
    parser.add_argument("--method", default="tome", help="any registered token reduction (default %(default)s)")


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each shape, batch size and r."""
    for variant in options.variant.split(","):
        dense = vit.dense_model(variant, options)
        params = vit.random_params(dense)
        for batch in options.batch:
            for removed in options.r:
                reduction = {"method": options.method, "r": removed, "clamp": True}
                (hook,) = with_reduction(dense, reduction).hooks
                row = vit.row(f"ViT-{variant}", dense, hook, params, batch, options.repeats)
                yield {**row, "shape": f"{row['shape']} {options.method} r={removed}"}
