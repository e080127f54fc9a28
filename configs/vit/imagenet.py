# SPDX-License-Identifier: Apache-2.0
"""ViT of a published shape on ImageNet-1k, prepared for TensorFlow Datasets or in folders: imported weights, a reduction.

    python -m experiments.import_hf --model=vit-base-patch16-224 --workdir=runs/vit \\
        --config=configs/vit/imagenet.py:data_dir=DIR
    python -m experiments.evaluate --workdir=runs/vit
    python -m experiments.train --config=configs/vit/imagenet.py:variant=L/16,method=tome,r=8,data_dir=DIR --workdir=runs/large

`variant` is B/16, L/16, H/14 or another published shape; an imported checkpoint brings its own. `path` is a folder with one
folder of images a class, in place of the prepared set `imagenet2012` under `data_dir`; `valid_path` is one of validation
images. Pixels are normalised as DeiT and MAE have it (the mean and the deviation of ImageNet); an import takes what its
directory says. The recipe is a short fine-tuning for an accelerator; no accuracy is quoted, as no such run has been made.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.models import reduction_section

IMAGES = dict(
    image_size=224, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop="resized", crop_padding=0
)


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, variant="B/16", method="", r=0, data_dir="", path="", valid_path="", runlocal=False)
    config = base_config()
    config.task = "classification"
    config.model = ConfigDict(
        dict(
            variant=given.variant,
            num_classes=1000,
            pool="cls",
            reduction=reduction_section(method=given.method, r=given.r),
        )
    )
    prepared = dict(
        source="tfds_images",
        name="imagenet2012",
        data_dir=given.data_dir,
        train_split="train[:99%]",
        valid_split="train[99%:]",
        test_split="validation",
    )
    folders = dict(source="image_folder", path=given.path, valid_path=given.valid_path)
    config.data = resolve({**(folders if given.path else prepared), **IMAGES})
    config.steps = 20_000
    config.batch_size = 256
    config.dtype = "bfloat16"
    config.optimizer.peak = 5e-5
    config.optimizer.warmup = 1_000
    config.optimizer.weight_decay = 0.05
    config.eval.every = 2_000
    config.checkpoint.every = 1_000
    if given.runlocal:
        config.model.update(dict(variant="", patch_size=16, width=32, depth=2, heads=2, mlp_dim=64))
        config.data.image_size = 32
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
