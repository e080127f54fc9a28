# SPDX-License-Identifier: Apache-2.0
"""A small ViT on CIFAR-10 whose layers become Adaptive Computation Modules.

    python -m experiments.acm --config=configs/acm/cifar10.py:data_dir=DIR --workdir=runs/acm_cifar
    python -m experiments.acm --config=configs/acm/cifar10.py:data_dir=DIR,target=0.25 --workdir=runs/acm_cifar25
    python -m experiments.train --config=configs/acm/cifar10.py:data_dir=DIR,runlocal --workdir=runs/try

How to prepare the data stands in configs/tome/cifar10.py. Meant for an accelerator; no accuracy is quoted.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.acm import acm_section


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, target=0.5, learners=4, data_dir="", runlocal=False)
    config = base_config()
    config.task = "acm"
    config.model = ConfigDict(
        dict(
            patch_size=4,
            width=192,
            depth=9,
            heads=3,
            mlp_dim=768,
            num_classes=10,
            pool="cls",
            acm=acm_section(
                task="classification",
                learners=given.learners,
                gate_hidden=(16,),
                target=given.target,
                budget_on="argmax",
                phases=dict(
                    dense_steps=20_000, dense_peak=1e-3, dense_warmup=1_000, distill_steps=1_000, gate_steps=300
                ),
            ),
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
    config.steps = 5_000
    config.batch_size = 256
    config.optimizer.peak = 3e-4
    config.optimizer.warmup = 100
    config.eval.every = 1_000
    config.checkpoint.every = 1_000
    if given.runlocal:
        config.model.update(dict(width=32, depth=2, heads=2, mlp_dim=64))
        config.model.acm.phases.update(dict(dense_steps=2, distill_steps=2, gate_steps=2))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
