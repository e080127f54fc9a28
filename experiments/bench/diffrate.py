# SPDX-License-Identifier: Apache-2.0
"""DiffRate's prune-then-merge on ViT shapes: implied and realised speedup, and the share of matching and merging.

The schedule brings the multiply-adds down to `--budget` of the dense model's: about as many tokens go at every layer but the
first, half of them pruned, half merged. `overhead` is the time of one such reduction at full length over that of one dense
block. With `--peer`, ToMe in plain PyTorch (`experiments/peers/torch_tome.py`) runs the same shape with the same tokens after
each layer on the same machine; `--peer-python` names an interpreter that has PyTorch.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from adaptive.rates.schedules import Schedule, Space, cost_of
from experiments.bench import vit
from layers.learned_rates import as_reduce
from layers.vit import ViT

_PEER = pathlib.Path(__file__).parents[1] / "peers" / "torch_tome.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of this benchmark."""
    vit.add_arguments(parser, "B/16,L/16,H/14")
    parser.add_argument(
        "--budget", type=float, default=0.6, help="share of the dense multiply-adds (default %(default)s)"
    )
    parser.add_argument("--peer", action="store_true", help="also time ToMe in plain PyTorch")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has PyTorch (default: this one)"
    )


def schedule_of(model: ViT, budget: float) -> Schedule:
    """Half of what goes is pruned, half merged, about as many at every layer but the first.

    Raises:
      ValueError: no schedule meets the share `budget` of the dense multiply-adds.
    """
    cost = cost_of(model.spec())
    space = Space(model.depth, model.num_tokens, cost, budget * cost((model.num_tokens,) * model.depth))
    return Schedule.split(space.linear(), model.num_tokens, pruned=0.5)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each shape and batch size.

    Raises:
      ValueError: no schedule meets the budget, or the peer cannot run.
    """
    for variant in options.variant.split(","):
        dense = vit.dense_model(variant, options)
        hook = as_reduce(schedule_of(dense, options.budget))
        params = vit.random_params(dense)
        for batch in options.batch:
            row = vit.row(f"ViT-{variant}", dense, hook, params, batch, options.repeats)
            row |= {"shape": f"{row['shape']} diffrate", "alive": list(dict(hook.layered)["alive"])}
            yield row | (_peer(options, variant, batch, hook.counts) if options.peer else {})


def _peer(options: argparse.Namespace, variant: str, batch: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Images a second of ToMe in plain PyTorch with as many tokens after each layer."""
    command = [options.peer_python, str(_PEER), f"--variant={variant}", f"--image-size={options.image_size}"]
    command += [f"--batch={batch}", f"--dtype={options.dtype}", f"--repeats={options.repeats}"]
    command += [f"--counts={','.join(map(str, counts))}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the peer failed: {' '.join(command)}\n{done.stderr.strip()[-2000:]}")
    return {"peer": json.loads(done.stdout.splitlines()[-1])}
