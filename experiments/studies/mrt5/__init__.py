# SPDX-License-Identifier: Apache-2.0
"""MrT5's learned gate against random and fixed deletion, pooling and dynamic chunking on byte-level T5.

The parts, in this order: the trade-off of bits per byte and sequence length left, with runtimes; the same by language, with
zero-shot transfer of an English gate; diagnostics and character tasks; the placement of the gate; which bytes are deleted. In
each part a dense model is trained first, then each method goes on from it for a while, as the paper does from ByT5.
Evaluation deletes for real, through the bucket ladder.
"""

from __future__ import annotations

from typing import Any

from experiments.studies.mrt5 import characters, deletions, languages, placement, trade_off
from experiments.studies.study import LONG_TEXT, Context

# What the full suite changes: the paper's lengths, a model of about 60 M parameters.
_FULL = {
    "model.width": 768,
    "model.mlp_dim": 2_048,
    "model.heads": 12,
    "model.head_dim": 64,
    "model.encoder_layers": 9,
    "model.decoder_layers": 3,
    "model.gate_layer": 3,
    "model.scan_layers": False,
    "model.rungs": (128, 256, 384, 512, 640, 768, 896, 1_024),
    "data.inputs_length": 1_024,
    "batch_size": 128,
}
_TUNE = {"optimizer.warmup": 10, "optimizer.peak": 0.01, "log_every": 5}
# What the learned gate needs when there are hundreds of steps, not thousands: a controller that may also push the gate open,
# and a model that meets hard deletion before it is evaluated, since a third of the gates are not saturated by then.
_GATE = {"model.deletion.floor": -0.05, "model.deletion.hard_probability": 0.5}
# Targets up to 80 % also need an integral that gets there in time, and that does not overshoot for long.
_GATE_WIDE = {**_GATE, "model.deletion.ki": 3e-4, "model.deletion.windup_limit": 0.006}
# The models of the quick suite: minutes on two CPU cores.
_SMALL = {
    "model.width": 64,
    "model.mlp_dim": 192,
    "model.heads": 2,
    "model.encoder_layers": 4,
    "model.decoder_layers": 1,
    "model.scan_layers": False,
    "model.rungs": (12, 24, 36, 48),
    "model.deletion.kp": 0.05,
    "data.context": 48,
    "data.targets_length": 16,
    "batch_size": 64,
}
_SPELLING = {"model.width": 96, "model.heads": 3, "model.rungs": (8, 16, 24, 32), "data.inputs_length": 32}
_SPELLING |= {"data.targets_length": 32, **LONG_TEXT}
_SEARCH = {"model.width": 96, "model.heads": 3, "model.rungs": (16, 24, 32, 48, 64, 80), "data.inputs_length": 80}
_SEARCH |= LONG_TEXT

# Name in the tables, share to remove or None, argument of the config, overrides.
NEIGHBOURS = (
    ("boundary_predictor", 0.5, "boundary_predictor,rate=0.5", {}),
    ("boundary_predictor", 0.7, "boundary_predictor,rate=0.7", {}),
    ("strided r=2", None, "strided,rate=0.5", {}),
    ("strided r=4", None, "strided,rate=0.75", {}),
    ("hnet", 0.5, "hnet,rate=0.5", {}),
    ("entropy_patches", None, "entropy_patches", {}),
    ("words", None, "words", {}),
    ("words, bytes see their word", None, "words", {"model.chunk_local": True}),
    ("gbst", None, "gbst,rate=0.5", {}),
)


def _task(config: str, arg: str, rate: float, base: int, tune: int, **overrides: Any) -> dict[str, Any]:
    """Settings of one diagnostic or character task: steps of the dense model and of the methods after it."""
    return dict(
        config=config,
        arg=arg,
        rate=rate,
        base={"steps": base, **overrides},
        tune={"steps": tune, **_TUNE, **overrides},
    )


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
            gate=_GATE_WIDE,
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
            base={"steps": 2_000, **LONG_TEXT},
            tune={"steps": 200, **_TUNE, **LONG_TEXT},
            gate=_GATE_WIDE,
            rates=(0.1, 0.3, 0.5, 0.8),
            shown=4,
            floor={"data.context": 1, "steps": 1_000, "optimizer.peak": 0.03, "optimizer.warmup": 100},
            neighbours=NEIGHBOURS,
        ),
        languages=dict(
            config="mrt5/languages.py",
            arg="objective=next_byte",
            rate=0.5,
            base={"steps": 6_000, **_SMALL},
            tune={"steps": 300, **_TUNE, **_SMALL},
            gate=_GATE,
        ),
        characters=dict(
            seeds=(0,),
            gate=_GATE,
            tasks={
                "vowel removal": _task("mrt5/diagnostics.py", "task=vowel_removal", 0.18, 1_000, 300),
                "contextual vowel removal": _task(
                    "mrt5/diagnostics.py", "task=contextual_vowel_removal", 0.1, 800, 200
                ),
                "sequence merge": _task("mrt5/diagnostics.py", "task=sequence_merge", 0.15, 800, 200),
                "spelling correction": _task(
                    "mrt5/characters.py", "task=spelling_correction", 0.5, 800, 200, **_SPELLING
                ),
                "word search": _task("mrt5/characters.py", "task=word_search", 0.5, 800, 200, **_SEARCH),
            },
        ),
        placement=dict(
            config="mrt5/continuation.py",
            base={"steps": 2_000, **LONG_TEXT},
            tune={"steps": 200, **_TUNE, **LONG_TEXT},
            gate=_GATE,
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
            base={"steps": 30_000, **_FULL, **LONG_TEXT},
            tune={"steps": 5_000, **_FULL, **LONG_TEXT, "optimizer.peak": 0.003},
            rates=(0.3, 0.4, 0.5, 0.6, 0.7),
            shown=1,
            neighbours=NEIGHBOURS,
        ),
        languages=dict(
            config="mrt5/languages.py",
            arg="",
            rate=0.5,
            base={"steps": 30_000, **_FULL},
            tune={"steps": 5_000, **_FULL, "optimizer.peak": 0.003},
        ),
        characters=dict(
            seeds=(0, 1, 2),
            tasks={
                "vowel removal": _task("mrt5/diagnostics.py", "task=vowel_removal,full", 0.18, 30_000, 5_000),
                "contextual vowel removal": _task(
                    "mrt5/diagnostics.py", "task=contextual_vowel_removal,full", 0.18, 30_000, 5_000
                ),
                "sequence merge": _task("mrt5/diagnostics.py", "task=sequence_merge,full", 0.17, 30_000, 5_000),
                "spelling correction": _task(
                    "mrt5/characters.py", "task=spelling_correction", 0.5, 30_000, 5_000, **LONG_TEXT
                ),
                "word search": _task("mrt5/characters.py", "task=word_search", 0.7, 30_000, 5_000, **LONG_TEXT),
            },
        ),
        placement=dict(
            config="mrt5/spans.py",
            base={"steps": 30_000, **_FULL, **LONG_TEXT},
            tune={"steps": 5_000, **_FULL, **LONG_TEXT, "optimizer.peak": 0.003},
            rate=0.5,
            layers=(1, 2, 3, 4, 5),
        ),
    ),
}


def run(context: Context) -> None:
    """Runs every part that the suite has settings for."""
    settings, made = context.settings, trade_off.run(context, context.settings["trade_off"])
    deletions.run(context, settings["trade_off"])
    for name, part in (("languages", languages), ("characters", characters), ("placement", placement)):
        if name in settings:
            made += part.run(context, settings[name])
    context.rows.keep(dict.fromkeys(made))
