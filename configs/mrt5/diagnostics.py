# SPDX-License-Identifier: Apache-2.0
"""Synthetic diagnostics of deletion: vowels to remove, with or without regard to what precedes them, "ABC" to merge, a copy.

    python -m experiments.train --config=configs/mrt5/diagnostics.py:task=vowel_removal --workdir=runs/vowels
    python -m experiments.train --config=configs/mrt5/diagnostics.py:task=vowel_removal,gate=mrt5,rate=0.2 --workdir=runs/mrt5
    python -m experiments.train --config=configs/mrt5/diagnostics.py:task=sequence_merge,full --workdir=runs/merge
    python -m experiments.train --config=configs/mrt5/diagnostics.py:gate=mrt5,runlocal --workdir=runs/try

`task` is vowel_removal, contextual_vowel_removal, sequence_merge or copy; `gate` is a registered deletion method, or empty for
the dense model; `rate` is the share of bytes to delete (19% of random letters are vowels). Strings are random, so that training
and evaluation never meet. Dense, 1,000 steps get 99% of vowel removals on 32 bytes wholly right, in minutes on two CPU cores.
`full` is the paper's scale (Kallini et al. 2025): 9+3 layers of width 512 on 64 bytes, where
the dense model gets 99.9% of vowel removals wholly right after 30,000 steps of 128; its fixed weights of the regulariser are
replaced by the controller here.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.deletion import deletion_section, gate_hyper


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, task="vowel_removal", gate="", rate=0.2, full=False, runlocal=False)
    config = base_config()
    config.task = "seq2seq"
    config.model = ConfigDict(
        dict(
            width=96,
            mlp_dim=192,
            heads=3,
            head_dim=32,
            encoder_layers=4,
            decoder_layers=2,
            softmax="off_by_one",
            gate=given.gate,
            gate_layer=2,
            gate_hyper=gate_hyper(given.gate, given.rate),
            rungs=(16, 20, 24, 28, 32),
            deletion=deletion_section(target=given.rate, kp=0.05, ki=1e-4),
        )
    )
    config.data = resolve(dict(source="diagnostic", diagnostic=given.task, length=32, valid_examples=2_000))
    config.steps = 1_000
    config.batch_size = 64
    # T5's own optimiser: its unscaled attention logits learn slowly with Adam's equal steps.
    config.optimizer.name = "adafactor"
    config.optimizer.peak = 0.03
    config.optimizer.warmup = 100
    config.eval.every = 500
    config.checkpoint.every = 500
    if given.full:
        config.model.update(dict(width=512, mlp_dim=1024, heads=6, head_dim=64, encoder_layers=9, decoder_layers=3))
        config.model.update(dict(gate_layer=3, rungs=(40, 48, 52, 56, 64)))
        config.model.deletion.update(dict(kp=0.5, ki=1e-5, delay=10_000))
        config.data.update(dict(length=64, examples=6_400_000, valid_examples=32_000))
        config.steps, config.batch_size = 30_000, 128
        config.optimizer.name = "adamw"
        config.optimizer.peak = 1e-4
        config.optimizer.warmup = 0
        config.eval.every, config.checkpoint.every = 2_000, 1_000
    if given.runlocal:
        config.model.update(dict(width=32, mlp_dim=64, heads=2, head_dim=16, encoder_layers=3, decoder_layers=1))
        config.model.rungs = (12, 16)
        config.data.update(dict(length=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
