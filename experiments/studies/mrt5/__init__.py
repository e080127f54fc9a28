# SPDX-License-Identifier: Apache-2.0
"""MrT5's learned gate against random and fixed deletion, pooling and dynamic chunking on byte-level T5.

The parts, in this order: the trade-off of bits per byte and sequence length left, with runtimes; the same by language, with
zero-shot transfer of an English gate; diagnostics and character tasks; the placement of the gate; which bytes are deleted. In
each part a dense model is trained first, then each method goes on from it for a while, as the paper does from ByT5.
Evaluation deletes for real, through the bucket ladder.
"""

from __future__ import annotations

from typing import Any

from experiments.studies.mrt5 import deletions, placement, trade_off
from experiments.studies.study import Context

# What the full suite changes: the paper's lengths, a model of about 60 M parameters.
_FULL = {
    "model.width": 768,
    "model.mlp_dim": 2_048,
    "model.heads": 12,
    "model.head_dim": 64,
    "model.encoder_layers": 9,
    "model.decoder_layers": 3,
    "model.gate_layer": 3,
    "model.rungs": (128, 256, 384, 512, 640, 768, 896, 1_024),
    "data.inputs_length": 1_024,
    "batch_size": 128,
}
_TUNE = {"optimizer.warmup": 10, "optimizer.peak": 0.01, "log_every": 5}

# `base`: training of the dense model that all start from; `tune`: of every method after that, dense included.
SUITES: dict[str, dict[str, Any]] = {
    "headline": dict(
        seeds=(0,),
        batches=10,
        repeats=15,
        trade_off=dict(
            config="mrt5/continuation.py",
            base={"steps": 800},
            tune={"steps": 150, **_TUNE},
            rates=(0.5, 0.8),
            shown=2,
        ),
    ),
    "quick": dict(
        seeds=(0, 1, 2),
        batches=20,
        repeats=15,
        trade_off=dict(
            config="mrt5/continuation.py",
            base={"steps": 2_000},
            tune={"steps": 300, **_TUNE},
            rates=(0.1, 0.3, 0.5, 0.8),
            shown=4,
            floor={"data.context": 1, "steps": 2_000},
        ),
        placement=dict(
            config="mrt5/continuation.py",
            base={"steps": 2_000},
            tune={"steps": 300, **_TUNE},
            rate=0.5,
            layers=(1, 2, 3, 4),
        ),
    ),
    "full": dict(
        seeds=(0, 1, 2),
        batches=100,
        repeats=15,
        trade_off=dict(
            config="mrt5/spans.py",
            base={"steps": 30_000, **_FULL},
            tune={"steps": 5_000, **_FULL, "optimizer.peak": 0.003},
            rates=(0.3, 0.4, 0.5, 0.6, 0.7),
            shown=1,
        ),
    ),
}


def run(context: Context) -> None:
    """Runs every part that the suite has settings for."""
    settings, made = context.settings, trade_off.run(context, context.settings["trade_off"])
    deletions.picture(context, settings["trade_off"])
    if "placement" in settings:
        made += placement.run(context, settings["placement"])
    context.rows.keep(dict.fromkeys(made))
