# SPDX-License-Identifier: Apache-2.0
"""Turns a checkpoint of a run into a Hugging Face safetensors directory; the way back of `experiments.import_hf`.

    python -m experiments.export_hf --workdir=runs/byt5 --out=byt5-mine
    python -m experiments.export_hf --workdir=runs/mrt5 --out=mrt5-mine --step=best --dtype=bfloat16

The moving average is taken where the run keeps one. A dense T5 with the usual softmax is written as T5 or mT5, any other as
MrT5, which the public MrT5 code reads; a decoder as Llama or, with biases, as Qwen2. Token ids and other settings of an
imported run are those that it came with.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from experiments import tasks
from experiments.checkpoints import Checkpointer, DamagedCheckpoint, NoSoundCheckpoint, Restored
from experiments.config import load_config
from experiments.import_hf import HF_CONFIG, summary
from layers import hf


def export_checkpoint(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | str | None = None,
    dtype: str = "float32",
) -> str:
    """Writes `out` and returns a table of what was mapped; see the module docstring.

    Args:
      step: of the checkpoint; "best", or None for the newest.
      dtype: of the tensors that are written.

    Raises:
      ValueError: the model has no Hugging Face form, or `out` holds a checkpoint.
      FileNotFoundError: no run, or no such checkpoint.
    """
    workdir = epath.Path(workdir).expanduser()
    config = load_config(workdir)
    module = tasks.build(config).model
    restored = _restore(workdir, config, hf.abstract_params(module), step)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), restored.state)
    described = hf.save(out, module, {"params": params}, restored.meta.get(HF_CONFIG))
    table = summary(module, params, described)
    return f"{table}\n{described['architectures'][0]} of step {restored.step} in {out}"


def _restore(workdir: epath.Path, config: Any, abstract: Any, step: int | str | None) -> Restored:
    settings = config.checkpoint
    best = dict(best_metric=settings.best or None, best_mode=settings.best_mode)
    with Checkpointer(workdir / "checkpoints", every=settings.every, keep=settings.keep, **best) as checkpointer:
        return checkpointer.restore_params(abstract, step, collection="ema" if config.ema else "params")


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, exports, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.export_hf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="directory of a run of experiments.train")
    parser.add_argument("--out", required=True, help="directory to write config.json and safetensors into")
    parser.add_argument("--step", default="", help="a step, or best; the newest when not given")
    parser.add_argument("--dtype", default="float32", choices=sorted(hf.DTYPES.values()), help="of the tensors")
    options = parser.parse_args(argv)
    step = int(options.step) if options.step.isdigit() else options.step or None
    try:
        text = export_checkpoint(options.workdir, options.out, step=step, dtype=options.dtype)
    except (ValueError, KeyError, OSError, DamagedCheckpoint, NoSoundCheckpoint) as error:
        print(f"error: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
