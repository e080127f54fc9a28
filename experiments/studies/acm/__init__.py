# SPDX-License-Identifier: Apache-2.0
"""Adaptive Computation Modules against early exits, halting tokens, experts, narrower layers and switched channels.

The parts: accuracy or bits per byte against compute for a ViT and a byte-level language model; where learners go, by layer
and by token; what each phase and loss is worth; corrupted inputs at equal budget; measured speedup by budget and batch. All
methods go on from the same dense model for as many steps.
"""

from __future__ import annotations

from typing import Any

from experiments.studies.acm import images, text
from experiments.studies.study import LONG_TEXT, Context

# The dense model is near the end of its training: otherwise methods that train its blocks on gain from that alone.
_SHORT = {"dense_steps": 5_000, "distill_steps": 250, "gate_steps": 50}
_IMAGES = {
    "config": "acm/digits.py",
    "overrides": {
        "steps": 400,
        "optimizer.peak": 2.5e-3,
        "optimizer.warmup": 20,
        "data.image_size": 32,
        **{f"model.acm.phases.{k}": v for k, v in _SHORT.items()},
    },
    "targets": (0.8, 0.65, 0.5, 0.35, 0.2),
    "thresholds": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97),
    "depths": (1.5, 2.5),
    "experts": (2, 4, 8),
    "ratios": (0.8,),
    "widths": (0.25, 0.5),
    "baselines": ("uniform", "early_exit", "ztw", "avit", "moefication", "mc_moe", "dydit"),
    "batches": (8, 32, 128),
}
_TEXT = {
    "config": "acm/text.py",
    # 65,536 bytes; a head of 384 numbers after every layer makes early exits slow to evaluate.
    "evaluated": 8,
    # Learners of gated feed-forward layers start at random: they need more of distillation than those cut from dense ones.
    "overrides": {
        "steps": 400,
        "model.acm.phases.dense_steps": 1_500,
        "model.acm.phases.distill_steps": 800,
        **LONG_TEXT,
    },
    "targets": (0.8, 0.65, 0.5, 0.35, 0.2),
    "thresholds": (0.3, 0.5, 0.7, 0.9),
}

# Small enough for minutes on two cores, and so as short of steps as the others: learners are cut from the dense model and the
# budget weighs as much as theirs, where the config itself has the paper's random learners and weights.
_CIFAR10 = {
    "overrides": {
        "model.width": 64,
        "model.depth": 4,
        "model.heads": 4,
        "model.mlp_dim": 256,
        "model.acm.gate_hidden": (4,),
        "model.acm.start": "dense",
        "model.acm.budget_weight": 5.0,
        **{f"model.acm.phases.{k}": v for k, v in {**_SHORT, "dense_steps": 2_000, "dense_peak": 2e-3}.items()},
        "batch_size": 32,
        "steps": 300,
        "optimizer.peak": 3e-3,
        "optimizer.warmup": 20,
    },
    "baselines": ("uniform", "early_exit", "avit"),
    "ablations": False,
}

SUITES: dict[str, dict[str, Any]] = {
    "headline": dict(
        seeds=(0,),
        repeats=5,
        evaluated=8,
        images={
            **_IMAGES,
            "overrides": {
                **_IMAGES["overrides"],
                "steps": 150,
                "optimizer.peak": 3e-3,
                "model.acm.phases.dense_steps": 600,
                "model.acm.phases.distill_steps": 150,
                "model.acm.phases.gate_steps": 40,
            },
            "targets": (0.65, 0.35),
            "thresholds": (0.4, 0.6, 0.8, 0.9),
            "baselines": ("uniform", "early_exit"),
            "batches": (),
            "ablations": False,
        },
    ),
    "quick": dict(
        seeds=(0, 1, 2),
        repeats=7,
        evaluated=0,
        images={**_IMAGES, "ablations": True},
        text=_TEXT,
        cifar10=_CIFAR10,
    ),
    "full": dict(
        seeds=(0, 1, 2),
        repeats=15,
        evaluated=0,
        images={
            **_IMAGES,
            "overrides": {
                "model.width": 384,
                "model.depth": 12,
                "model.heads": 6,
                "model.mlp_dim": 1_536,
                "model.acm.gate_hidden": (16, 16),
                "model.acm.phases.dense_steps": 30_000,
                "model.acm.phases.distill_steps": 2_000,
                "model.acm.phases.gate_steps": 500,
                "data.image_size": 128,
                "data.examples": 200_000,
                "data.cache": False,
                "batch_size": 256,
                "steps": 10_000,
            },
            "depths": (4.0, 6.0, 8.0),
            "ablations": True,
        },
        text={
            **_TEXT,
            "overrides": {
                "model.width": 512,
                "model.depth": 12,
                "model.heads": 8,
                "model.kv_heads": 8,
                "model.mlp_dim": 1_536,
                "model.acm.gate_hidden": (16, 16),
                "model.acm.phases.dense_steps": 30_000,
                "data.length": 512,
                "batch_size": 64,
                "steps": 5_000,
                **LONG_TEXT,
            },
        },
    ),
}


def run(context: Context) -> None:
    """Runs every part that the suite has settings for; CIFAR-10 where its folder is given."""
    settings = context.settings
    made = images.run(context, "images", settings["images"])
    if "cifar10" in context.data:
        own = {**settings["images"], "config": "acm/cifar10.py", "arg": f"data_dir={context.data['cifar10']}"}
        made += images.run(context, "cifar10", {**own, **settings.get("cifar10", {})})
    if "text" in settings:
        made += text.run(context, settings["text"])
    context.rows.keep(dict.fromkeys(made))
