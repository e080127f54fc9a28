# SPDX-License-Identifier: Apache-2.0
"""Compiles for TPUs and GPUs with neither present: memory, collectives and what kernels take, before a machine is paid for.

    python -m experiments.aot --config=configs/mrt5/spans.py:gate=mrt5 --topology=v5e:4x4
    python -m experiments.aot --config=configs/tome/cifar10.py --topology=v5p:4x4x4 --set parallel.preset=fsdp
    python -m experiments.aot --kernel=merge --chips=v5e,v6e
    python -m experiments.aot --kernel=all --out=results/tpu_aot
    python -m experiments.aot --kernel=all --chips=h200 --out=results/gpu_aot

A config's training and evaluation step are compiled for all devices of the topology with the sharding that training would use;
`--kernel` compiles a Pallas kernel at its named shapes and reads the compiler's schedule, or for a GPU registers, spills and
shared memory. One JSON object a line is printed. Times are estimates: nothing is run. The compiler for TPUs is in the package
libtpu (`pip install libtpu`, Linux on x86-64), that for GPUs in `jax-cuda13-plugin`, `jax-cuda13-pjrt` and `nvidia-cuda-nvcc`.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from experiments import config as config_lib
from experiments import data, parallel, tasks, train
from experiments.aot import compiler, gpu, kernels, points
from experiments.evaluate import parse_overrides
from pallas_kernels import dispatch


def steps(name: str, topology: str, overrides: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for the training step and one for the evaluation step of a config, compiled for a topology.

    Raises:
      ValueError: an unknown topology, or a batch that its devices cannot share.
    """
    devices = compiler.devices(topology)
    config = config_lib.load(name, overrides)
    task = tasks.build(config)
    dataset = data.build(config.data, split="train", batch_size=config.batch_size, seed=config.seed)
    mesh = parallel.make_mesh(config.parallel.preset, devices)
    program = train.build_program(config, task, dataset.spec, mesh=mesh)
    extra = program.state.extra
    with parallel.on_mesh(mesh):
        for part, function, arguments in (
            ("training step", program.train_step, (program.state, program.batch, program.healthy)),
            ("evaluation step", program.eval_step, (program.state.params, _weighed(program.batch), extra)),
        ):
            started = time.monotonic()
            with dispatch.compiled_for("tpu"):
                traced = function.trace(*arguments)
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
            used = compiler.memory(compiled)
            yield {
                "config": name,
                "part": part,
                "topology": topology,
                "devices": len(devices),
                "preset": config.parallel.preset,
                "bytes_a_device": used,
                "share_of_memory": round(used["all"] / compiler.chip(topology).memory, 4),
                "collectives": _collectives(compiled),
                "kernel_calls": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
                "compile_seconds": round(time.monotonic() - started, 1),
            }


def _weighed(batch: Any) -> Any:
    """An evaluation batch, which also says how much each row counts."""
    first = next(iter(batch.values()))
    weight = type(first)(first.shape[:1], "float32", sharding=first.sharding)
    return {**batch, "weight": weight}


def _collectives(compiled: Any) -> dict[str, dict[str, int]]:
    """How many collectives of each kind there are, and their bytes."""
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for collective in parallel.collectives(compiled):
        found[collective.kind]["count"] += 1
        found[collective.kind]["bytes"] += collective.bytes
    return dict(found)


def _rows_of(name: str, chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    if set(chips) <= gpu.CARDS.keys():
        return kernels.gpu_rows(name, chips)
    return itertools.chain(points.rows(name, chips, dump), kernels.rows(name, chips, dump))


def _kernel_rows(options: argparse.Namespace, chips: tuple[str, ...], dump: str) -> Iterator[dict[str, Any]]:
    names = list(kernels.KERNELS) if options.kernel == "all" else [options.kernel]
    for name in names:
        found = _rows_of(name, chips, dump)
        yield from kept(found, epath.Path(options.out) / f"{name}.json", chips) if options.out else found


def kept(rows: Iterator[dict[str, Any]], path: epath.Path, chips: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows, each written to the file as it comes, in place of the older one of its part, shape and chip.

    Older rows of other chips stay; those of `chips` that were not made again go when all rows are there, so that what is cut
    off loses nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    older = json.loads(path.read_text()) if path.exists() else []
    made = {}
    for row in rows:
        made[_place(row)] = row
        _write(path, [*made.values(), *(row for row in older if _place(row) not in made)])
        yield row
    _write(path, [*made.values(), *(row for row in older if row["chip"] not in chips)])


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("part", "shape", "chip"))


def _write(path: epath.Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1) + "\n")


def _prepare(options: argparse.Namespace, chips: tuple[str, ...], dump: str) -> None:
    """Gets the compiler of the chips ready.

    Raises:
      ValueError: an unknown chip, or chips of both kinds. ModuleNotFoundError: the compiler is not installed.
    """
    if options.kernel and set(chips) <= gpu.CARDS.keys():
        gpu.prepare()
        return
    if unknown := [name for name in chips if name not in compiler.CHIPS]:
        there = ", ".join([*compiler.CHIPS, *gpu.CARDS])
        raise ValueError(f"--chips={options.chips}: {unknown} is not one of {there}; GPUs go by themselves")
    compiler.prepare(dump if options.kernel else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.aot",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", help="compile the training and evaluation step of this config")
    what.add_argument("--kernel", choices=[*kernels.KERNELS, "all"], help="compile this kernel at its named shapes")
    parser.add_argument("--topology", default="v5e:4x4", help="machine for --config (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the config")
    parser.add_argument("--chips", default=",".join(compiler.CHIPS), help="for --kernel (default %(default)s)")
    parser.add_argument("--out", default="", help="folder of KERNEL.json files where --kernel also puts its rows")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, compiles, prints; returns the exit code."""
    options = _parser().parse_args(argv)
    chips = tuple(options.chips.split(","))
    with tempfile.TemporaryDirectory(prefix="adaptive_aot_") as dump:
        try:
            _prepare(options, chips, dump)
            if options.kernel:
                found = _kernel_rows(options, chips, dump)
            else:
                found = steps(options.config, options.topology, parse_overrides(options.set))
            for row in found:
                print(json.dumps(row), flush=True)
        except (ValueError, KeyError, ModuleNotFoundError, FileNotFoundError) as error:
            print(f"error: {error.args[0] if error.args else error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
