# SPDX-License-Identifier: Apache-2.0
"""Byte-level span corruption with a small T5, dense or with a deletion gate after the second encoder layer.

    python -m experiments.train --config=configs/mrt5/spans.py:gate=mrt5,rate=0.5 --workdir=runs/mrt5
    python -m experiments.train --config=configs/mrt5/spans.py:gate=random_deletion,rate=0.5 --workdir=runs/random
    python -m experiments.train --config=configs/mrt5/spans.py:gate=mrt5,runlocal --workdir=runs/try
    python -m experiments.train --config=configs/mrt5/spans.py:chunker=boundary_predictor,rate=0.7 --workdir=runs/bp
    python -m experiments.train --config=configs/mrt5/spans.py:gate=mrt5,path=BOOKS --workdir=runs/books

The text is two embedded novels unless `path` names text files. `gate` is a registered deletion method,
or empty for the dense model; `rate` is the share of bytes to delete. `chunker` instead groups bytes; one that can be
told how many chunks to make leaves `1 - rate` of them a byte. A reduced-scale form of the paper's continued pre-training
(Kallini et al. 2025, figure 2: ByT5-small scale, 1,024 bytes): 6+2 layers of width 96 on 128 bytes, some minutes on two CPU
cores. The gains of the controller are higher than the paper's, as there are few steps.
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
            width=96,
            mlp_dim=256,
            heads=3,
            head_dim=32,
            encoder_layers=6,
            decoder_layers=2,
            softmax="off_by_one",
            gate=given.gate,
            gate_layer=2,
            gate_hyper=gate_hyper(given.gate, given.rate),
            chunker=given.chunker,
            # The mixture of blocks works on embeddings.
            chunk_layer=0 if given.chunker == "gbst" else 2,
            chunk_hyper=chunk_hyper(given.chunker, given.rate),
            chunk_local=False,
            rungs=(32, 48, 64, 80, 96, 112, 128),
            # One compiled layer a stack: a ladder compiles the layers above the gate once for each rung.
            scan_layers=True,
            deletion=deletion_section(target=given.rate, kp=0.5, ki=1e-4),
        )
    )
    text = dict(text="files", path=given.path) if given.path else dict(text="books")
    config.data = resolve(dict(source="text", objective="span_corruption", inputs_length=128, **text))
    config.steps = 2_000
    config.batch_size = 16
    # T5's own optimiser: its unscaled attention logits learn slowly with Adam's equal steps.
    config.optimizer.name = "adafactor"
    config.optimizer.peak = 0.03
    config.optimizer.warmup = 100
    config.eval.every = 500
    config.eval.batches = 20
    config.checkpoint.every = 250
    if given.runlocal:
        config.model.update(dict(width=32, mlp_dim=64, heads=2, head_dim=16, encoder_layers=3, decoder_layers=1))
        config.model.rungs = (32, 64)
        config.data.update(dict(inputs_length=64, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.eval.batches = 1
        config.optimizer.warmup = 1
    return config
