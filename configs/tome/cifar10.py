# SPDX-License-Identifier: Apache-2.0
"""A small ViT on CIFAR-10 read through TensorFlow Datasets, without TensorFlow.

    python -m experiments.train --config=configs/tome/cifar10.py --workdir=runs/cifar --config.data.data_dir=DIR
    python -m experiments.train --config=configs/tome/cifar10.py:method=tome,r=4 --workdir=runs/cifar_tome

The data set must have been prepared in array_record form, by
`tfds.builder("cifar10", file_format="array_record").download_and_prepare()` on a machine with network. 20,000 steps are meant
for an accelerator; no accuracy is quoted, as no such run has been made.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.models import reduction_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, method="", r=0, data_dir="", runlocal=False)
    config = base_config()
    config.task = "classification"
    config.model = ConfigDict(
        dict(
            patch_size=4,
            width=192,
            depth=9,
            heads=3,
            mlp_dim=768,
            num_classes=10,
            pool="cls",
            reduction=reduction_section(method=given.method, r=given.r),
        )
    )
    config.data = resolve(
        dict(
            source="tfds_images",
            name="cifar10",
            data_dir=given.data_dir,
            image_size=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.247, 0.2435, 0.2616),
        )
    )
    config.steps = 20_000
    config.batch_size = 256
    config.optimizer.peak = 1e-3
    config.optimizer.warmup = 1_000
    config.optimizer.weight_decay = 0.05
    config.eval.every = 2_000
    config.checkpoint.every = 1_000
    if given.runlocal:
        config.model.update(dict(width=32, depth=2, heads=2, mlp_dim=64))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
