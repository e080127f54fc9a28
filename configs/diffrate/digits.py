# SPDX-License-Identifier: Apache-2.0
"""A tiny ViT on cluttered handwritten digits, on which compression rates are learned and searched.

    python -m experiments.train --config=configs/diffrate/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/diffrate/digits.py:runlocal --workdir=runs/try
    python -m experiments.train --config=configs/diffrate/digits.py:rates,target=0.6 --workdir=runs/rates

`rates` learns DiffRate's rates for a share `target` of the dense model's MACs (`price=both` as published, see
`adaptive.rates.proxy`; `order=density` for another order of the tokens than by class attention, see
`adaptive.reduction.diffrate`): it trains the rates alone, so give it trained parameters, as `experiments.reproduce
--only=diffrate` does.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.models import rates_section, reduction_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, rates=False, target=0.6, price="binding", order="", runlocal=False)
    config = base_config()
    config.task = "rates" if given.rates else "classification"
    config.model = ConfigDict(
        dict(
            patch_size=8,
            width=64,
            depth=6,
            heads=2,
            mlp_dim=256,
            num_classes=10,
            pool="cls",
            positions="sincos2d",
            activation="relu",
            reduction=reduction_section(),
        )
    )
    config.data = resolve(
        dict(source="digits", image_size=64, scale=(0.5, 0.75), clutter=4, examples=20_000, cache=True)
    )
    config.steps = 1_000
    config.batch_size = 32
    config.optimizer.peak = 2e-3
    config.optimizer.warmup = 100
    config.optimizer.weight_decay = 0.05
    config.eval.every = 500
    config.checkpoint.every = 250
    if given.rates:
        # A first layer that stays whole would be a sixth of so shallow a model. A hundred steps do not lead far from where
        # they start, so they start at a schedule that is good already.
        config.model.rates = ConfigDict(
            rates_section(target=given.target, first=0, price=given.price, weight=400.0, start="uniform")
        )
        if given.order:
            config.model.rates.order = given.order
        config.steps = 100
        config.optimizer.update(dict(peak=0.2, end=0.1, warmup=0, weight_decay=0.0))
        config.eval.every, config.checkpoint.every = 0, 100
    if given.runlocal:
        config.model.update(dict(width=32, depth=3, heads=2, mlp_dim=64))
        # The budget that three layers can meet.
        if given.rates:
            config.model.rates.target = 0.9
        config.data.update(dict(examples=64, valid_examples=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.optimizer.warmup = 1
    return config
