# SPDX-License-Identifier: Apache-2.0
"""Span corruption or continuation in several languages at once, each measured apart: bits per byte and share of bytes kept.

    python -m experiments.train --config=configs/mrt5/languages.py:path=TEXT,gate=mrt5,rate=0.5 --workdir=runs/languages
    python -m experiments.train --config=configs/mrt5/languages.py:path=TEXT,objective=next_byte --workdir=runs/continuation
    python -m experiments.train --config=configs/mrt5/languages.py:path=TEXT,gate=mrt5 --workdir=runs/zero_shot \
        --config.data.languages="('en',)" --config.data.eval_languages="('de','zh')"

`path` is a folder of files named `LANG_*.txt` or `LANG_*.txt.gz`; those with `.train.` or `.valid.` in their names are used
as such, and `include` is a glob that chooses among them (`*_ud.*`). Training draws the language of each example uniformly,
and evaluation gives each as many examples. `gate` is a registered deletion method, or empty for the dense model; `rate` is
the share of bytes to delete. A reduced-scale form of the paper's continued pre-training in 15 languages (Kallini et al. 2025:
ByT5-small scale, 1,024 bytes): 6+2 layers of width 96 on 128 bytes. The gains of the controller are higher than the paper's,
as there are few steps.
"""

from ml_collections import ConfigDict

from experiments.config import base_config, parse_arg
from experiments.data import resolve
from experiments.tasks.deletion import deletion_section, gate_hyper


def get_config(arg: str | None = None) -> ConfigDict:
    """The config; `arg` as in the module docstring."""
    given = parse_arg(arg, path="", include="", objective="span_corruption", gate="", rate=0.5, runlocal=False)
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
            rungs=(32, 48, 64, 80, 96, 112, 128),
            # One compiled layer a stack: a ladder compiles the layers above the gate once for each rung.
            scan_layers=True,
            deletion=deletion_section(target=given.rate, kp=0.5, ki=1e-4),
        )
    )
    lengths = dict(inputs_length=128) if given.objective == "span_corruption" else dict(context=128, targets_length=16)
    chosen = dict(path=given.path, include=given.include, objective=given.objective)
    config.data = resolve(dict(source="text", text="languages", eval_examples=64, **chosen, **lengths))
    config.steps = 5_000
    config.batch_size = 32
    # T5's own optimiser: its unscaled attention logits learn slowly with Adam's equal steps.
    config.optimizer.name = "adafactor"
    config.optimizer.peak = 0.03
    config.optimizer.warmup = 100
    config.eval.every = 1_000
    config.checkpoint.every = 500
    if given.runlocal:
        config.model.update(dict(width=32, mlp_dim=64, heads=2, head_dim=16, encoder_layers=3, decoder_layers=1))
        config.model.rungs = (32, 64)
        config.data.update(dict(inputs_length=64) if given.objective == "span_corruption" else dict(context=64))
        config.data.update(dict(eval_examples=4, threads=0))
        config.steps, config.batch_size, config.eval.every, config.checkpoint.every = 2, 8, 2, 2
        config.optimizer.warmup = 1
    return config
