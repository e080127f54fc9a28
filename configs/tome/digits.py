# SPDX-License-Identifier: Apache-2.0
"""A small ViT on cluttered handwritten digits, the model on which ToMe and pruning are compared without training.

    python -m experiments.train --config=configs/tome/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/tome/digits.py:runlocal --workdir=runs/try
    python -m experiments.train --config=configs/tome/digits.py:method=tome,r=4 --workdir=runs/digits_tome

Dense, it reaches about 95 % on the valid split in 1,500 steps: some 3 minutes on two CPU cores. `method` and `r` train with a
reduction. The paper has no such data set; its ImageNet rows need the checkpoint import and are not here yet.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.models import reduction_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, method="", r=0, runlocal=False)
    config = base_config()
    config.task = "classification"
    config.model = ConfigDict(
        dict(
            patch_size=8,
            width=96,
            depth=6,
            heads=4,
            mlp_dim=384,
            num_classes=10,
            pool="cls",
            positions="sincos2d",
            reduction=reduction_section(method=given.method, r=given.r),
        )
    )
    config.data = resolve(
        dict(source="digits", image_size=64, scale=(0.5, 0.75), clutter=4, examples=20_000, cache=True)
    )
    config.steps = 2_000
    config.batch_size = 32
    config.optimizer.peak = 2e-3
    config.optimizer.warmup = 100
    config.optimizer.weight_decay = 0.05
    config.eval.every = 500
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, depth=2, heads=2, mlp_dim=64))
        config.data.update(dict(examples=64, valid_examples=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.optimizer.warmup = 1
    return config
