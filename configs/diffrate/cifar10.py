# SPDX-License-Identifier: Apache-2.0
"""A tiny ViT on CIFAR-10 read through TensorFlow Datasets, on which compression rates are learned and searched.

    python -m experiments.train --config=configs/diffrate/cifar10.py --workdir=runs/cifar --config.data.data_dir=DIR
    python -m experiments.train --config=configs/diffrate/cifar10.py:runlocal,data_dir=DIR --workdir=runs/try
    python -m experiments.train --config=configs/diffrate/cifar10.py:rates,target=0.6,data_dir=DIR --workdir=runs/rates

`rates` learns DiffRate's rates for a share `target` of the dense model's MACs (`price=both` as published, see
`adaptive.rates.proxy`; `order=density` for another order of the tokens than by class attention, see
`adaptive.reduction.diffrate`): it trains the rates alone, so give it trained parameters, as `experiments.reproduce
--only=diffrate --data cifar10=DIR` does. The data set must have been prepared in array_record form, by
`tfds.builder("cifar10", file_format="array_record").download_and_prepare()`. The model is sized for one CPU core, not
for accuracy.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.models import rates_section, reduction_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, rates=False, target=0.6, price="binding", order="", data_dir="", runlocal=False)
    config = base_config()
    config.task = "rates" if given.rates else "classification"
    config.model = ConfigDict(
        dict(
            patch_size=4,
            stem=(32, 64),
            width=64,
            depth=6,
            heads=2,
            mlp_dim=128,
            num_classes=10,
            pool="cls",
            positions="sincos2d",
            activation="relu",
            reduction=reduction_section(),
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
            crop_padding=2,
        )
    )
    config.steps = 7_000
    config.batch_size = 64
    config.optimizer.peak = 2e-3
    config.optimizer.warmup = 200
    config.optimizer.weight_decay = 0.05
    config.eval.every = 0
    config.checkpoint.every = 500
    if given.rates:
        # A first layer that stays whole would be a sixth of so shallow a model. A hundred steps do not lead far from where
        # they start, so they start at a schedule that is good already.
        config.model.rates = ConfigDict(
            rates_section(
                target=given.target, first=0, price=given.price, weight=400.0, start="uniform", start_pruned=0.1
            )
        )
        if given.order:
            config.model.rates.order = given.order
        config.steps = 100
        config.batch_size = 32
        config.optimizer.update(dict(peak=0.2, end=0.1, warmup=0, weight_decay=0.0))
        config.eval.every, config.checkpoint.every = 0, 100
    if given.runlocal:
        config.model.update(dict(width=32, depth=3, heads=2, mlp_dim=64))
        # The budget that three layers can meet.
        if given.rates:
            config.model.rates.target = 0.9
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
