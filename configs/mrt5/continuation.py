# SPDX-License-Identifier: Apache-2.0
"""Byte-level continuation with a small T5: the encoder reads 47 bytes and eos, the decoder predicts the next 16.

    python -m experiments.train --config=configs/mrt5/continuation.py:gate=mrt5,rate=0.5 --workdir=runs/mrt5
    python -m experiments.train --config=configs/mrt5/continuation.py:gate=random_deletion,rate=0.5 --workdir=runs/random
    python -m experiments.train --config=configs/mrt5/continuation.py:gate=mrt5,runlocal --workdir=runs/try
    python -m experiments.train --config=configs/mrt5/continuation.py:chunker=boundary_predictor,rate=0.7 --workdir=runs/bp

The text is two embedded novels unless `path` names text files. `gate` is a registered deletion method,
or empty for the dense model; `rate` is the share of bytes to delete. `chunker` instead groups bytes; one that can be told how
many chunks to make leaves `1 - rate` of them a byte. Nothing in the paper has this form: it is what a model of a third of a
million parameters learns from its encoder within minutes on two CPU cores, where span corruption takes far longer. Dense, 2,000
steps give 2.1 bits per byte, and 3.5 when the encoder reads another text. The gains of the controller suit hundreds of steps,
not thousands.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.chunking import chunk_hyper
from experiments.tasks.deletion import deletion_section, gate_hyper


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, gate="", chunker="", rate=0.5, path="", runlocal=False)
    config = base_config()
    config.task = "seq2seq"
    config.model = ConfigDict(
        dict(
            width=64,
            mlp_dim=192,
            heads=2,
            head_dim=32,
            encoder_layers=4,
            decoder_layers=1,
            softmax="off_by_one",
            gate=given.gate,
            gate_layer=2,
            gate_hyper=gate_hyper(given.gate, given.rate),
            chunker=given.chunker,
            # The mixture of blocks works on embeddings.
            chunk_layer=0 if given.chunker == "gbst" else 2,
            chunk_hyper=chunk_hyper(given.chunker, given.rate),
            chunk_local=False,
            rungs=(12, 24, 36, 48),
            deletion=deletion_section(target=given.rate, kp=0.05, ki=1e-4),
        )
    )
    text = dict(text="files", path=given.path) if given.path else dict(text="books")
    config.data = resolve(dict(source="text", objective="next_byte", context=48, targets_length=16, **text))
    config.steps = 2_000
    config.batch_size = 64
    config.optimizer.name = "adafactor"
    config.optimizer.peak = 0.03
    config.optimizer.warmup = 100
    config.eval.every = 500
    config.eval.batches = 20
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, mlp_dim=64, heads=2, head_dim=16, encoder_layers=3, decoder_layers=1))
        config.model.rungs = (8, 16)
        config.data.update(dict(context=16, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
