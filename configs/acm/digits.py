# SPDX-License-Identifier: Apache-2.0
"""A small ViT on cluttered handwritten digits whose layers become Adaptive Computation Modules.

    python -m experiments.acm --config=configs/acm/digits.py --workdir=runs/acm
    python -m experiments.acm --config=configs/acm/digits.py:target=0.25 --workdir=runs/acm25 --dense=runs/acm/dense
    python -m experiments.train --config=configs/acm/digits.py:runlocal --workdir=runs/try

`experiments.acm` runs all phases; `experiments.train` alone trains the last one from random parameters. `target` is the share
of the learners' cost that a batch should spend. The paper's models are ViT-B/16 on ImageNet with gates of 16 and 16; a model
this narrow has smaller ones, so that they cost no larger a share of it.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.acm import acm_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, target=0.5, learners=4, runlocal=False)
    config = base_config()
    config.task = "acm"
    config.model = ConfigDict(
        dict(
            patch_size=8,
            width=64,
            depth=4,
            heads=4,
            mlp_dim=256,
            num_classes=10,
            pool="cls",
            positions="sincos2d",
            acm=acm_section(
                task="classification",
                learners=given.learners,
                gate_hidden=(4,),
                target=given.target,
                # Not the paper's, as training is short: a stronger budget, on the choices of inference, and learners that are
                # cut from the dense model.
                budget_weight=5.0,
                budget_on="argmax",
                start="dense",
                phases=dict(dense_steps=2_000, distill_steps=500, gate_steps=100),
            ),
        )
    )
    config.data = resolve(
        dict(source="digits", image_size=48, scale=(0.5, 0.75), clutter=4, examples=20_000, cache=True)
    )
    config.steps = 500
    config.batch_size = 32
    config.optimizer.peak = 3e-3
    config.optimizer.warmup = 50
    config.eval.every = 500
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, depth=2, heads=2, mlp_dim=64))
        config.model.acm.phases.update(dict(dense_steps=2, distill_steps=2, gate_steps=2))
        config.data.update(dict(examples=64, valid_examples=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.optimizer.warmup = 1
    return config
