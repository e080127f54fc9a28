# SPDX-License-Identifier: Apache-2.0
"""XNLI as byte-level sequences: trained on English MultiNLI, evaluated in 15 languages, read through TensorFlow Datasets.

    python -m experiments.train --config=configs/mrt5/xnli.py:gate=mrt5,rate=0.5,data_dir=DIR --workdir=runs/xnli
    python -m experiments.evaluate --workdir=runs/xnli --split=test

`gate` is a registered deletion method, or empty for the dense model; `rate` is the share of bytes to delete. The sets `xnli`
and `multi_nli` must have been prepared under `data_dir` in array_record form, by
`tfds.builder(NAME, file_format="array_record").download_and_prepare()`
on a machine with network; XNLI itself has no training split. Sizes are ByT5-small's and its lengths the paper's (Kallini et
al. 2025; the optimiser settings of its fine-tuning are not published beyond a default learning rate), meant for an
accelerator and for pretrained parameters; no accuracy is quoted, as no such run has been made. `sequence_accuracy` is that of
the one byte that names the class, with eos.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.deletion import deletion_section, gate_hyper


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, gate="", rate=0.5, data_dir="", runlocal=False)
    config = base_config()
    config.task = "seq2seq"
    config.model = ConfigDict(
        dict(
            width=1472,
            mlp_dim=3584,
            heads=6,
            head_dim=64,
            encoder_layers=12,
            decoder_layers=4,
            softmax="off_by_one",
            gate=given.gate,
            gate_layer=3,
            gate_hyper=gate_hyper(given.gate, given.rate),
            rungs=(128, 192, 256, 384, 512, 640, 768, 1024),
            scan_layers=True,
            deletion=deletion_section(target=given.rate, kp=0.5, ki=1e-5),
        )
    )
    config.data = resolve(dict(source="pairs", pairs="xnli", data_dir=given.data_dir))
    config.dtype = "bfloat16"
    config.steps = 10_000
    config.batch_size = 64
    config.optimizer.peak = 1e-4
    config.eval.every = 1_000
    config.eval.batches = 60
    config.checkpoint.every = 500
    if given.runlocal:
        config.model.update(dict(width=32, mlp_dim=64, heads=2, head_dim=16, encoder_layers=4, decoder_layers=1))
        config.model.rungs = (32, 64)
        config.data.update(dict(inputs_length=64, threads=0))
        config.dtype = "float32"
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 2
        config.optimizer.warmup = 1
    return config
