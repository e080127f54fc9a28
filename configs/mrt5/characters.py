# SPDX-License-Identifier: Apache-2.0
"""Character tasks generated from text: spelling correction in context, and word search.

    python -m experiments.train --config=configs/mrt5/characters.py:task=spelling_correction --workdir=runs/spelling
    python -m experiments.train --config=configs/mrt5/characters.py:task=word_search,gate=mrt5,rate=0.7 --workdir=runs/search
    python -m experiments.train --config=configs/mrt5/characters.py:path=BOOKS,gate=mrt5 --workdir=runs/books
    python -m experiments.train --config=configs/mrt5/characters.py:gate=mrt5,runlocal --workdir=runs/try

The text is two embedded novels unless `path` names text files, in any language. `gate` is a registered
deletion method, or empty for the dense model; `rate` is the share of bytes to delete (the paper's runs: 0.5 for spelling, 0.7
for word search). Accuracies are reported apart for errors that need the context and those that do not, and for words that were
held out of training and words that share a letter with another. Kallini et al. 2025 fine-tune ByT5-small, continued, on the
published pairs; this trains a small model from scratch on generated ones, so that their numbers are no target here.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.deletion import deletion_section, gate_hyper


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, task="spelling_correction", gate="", rate=0.5, path="", runlocal=False)
    config = base_config()
    config.task = "seq2seq"
    config.model = ConfigDict(
        dict(
            width=128,
            mlp_dim=256,
            heads=4,
            head_dim=32,
            encoder_layers=4,
            decoder_layers=2,
            softmax="off_by_one",
            gate=given.gate,
            gate_layer=2,
            gate_hyper=gate_hyper(given.gate, given.rate),
            rungs=(16, 24, 32, 48, 64) if given.task == "spelling_correction" else (32, 48, 64, 96, 128),
            deletion=deletion_section(target=given.rate, kp=0.05, ki=1e-4),
        )
    )
    text = dict(text="files", path=given.path) if given.path else dict(text="books")
    config.data = resolve(dict(source="characters", characters=given.task, **text))
    config.steps = 10_000
    config.batch_size = 64
    # T5's own optimiser: its unscaled attention logits learn slowly with Adam's equal steps.
    config.optimizer.name = "adafactor"
    config.optimizer.peak = 0.03
    config.optimizer.warmup = 100
    config.eval.every = 1_000
    config.eval.batches = 40
    config.checkpoint.every = 500
    if given.runlocal:
        config.model.update(dict(width=32, mlp_dim=64, heads=2, head_dim=16, encoder_layers=3, decoder_layers=1))
        config.model.rungs = (32, 64)
        config.data.update(dict(max_bytes=200_000, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 4
        config.optimizer.warmup = 1
    return config
