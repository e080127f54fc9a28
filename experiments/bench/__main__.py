# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark and prints one JSON object a line.

python -m experiments.bench --list
python -m experiments.bench tome
python -m experiments.bench tome --variant=S/16 --batch=1,8 --r=8,13,16
python -m experiments.bench diffrate --variant=B/16 --batch=8 --peer
python -m experiments.bench mrt5 --batch=1 --length=512 --out=results/bench/mrt5.jsonl
python -m experiments.bench generate --batch=1,8 --length=1024 --max-length=64 --deleted=0.5
python -m experiments.bench skipdecode --batch=1,8 --speedup=2,3
python -m experiments.bench sink_window --batch=8 --length=8192 --window=512
python -m experiments.bench autotune --op=ragged_prefix_mlp
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from etils import epath

from experiments import measure
from experiments.bench import BENCHES
from experiments.memory import keep_freed_pages
from experiments.rundir import git_revision, versions


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, runs one benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="list the benchmarks and what each one measures")
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    for name, bench in BENCHES.items():
        head = bench.__doc__.strip().splitlines()[0]
        command = commands.add_parser(name, help=head, description=bench.__doc__)
        command.add_argument("--out", default="", help="also append the rows to this JSON lines file")
        bench.add_arguments(command)
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{name:24} {bench.__doc__.strip().splitlines()[0]}" for name, bench in BENCHES.items()))
        return 0
    if not options.name:
        parser.error(f"name a benchmark: {', '.join(BENCHES)}; or --list")
    facts = {"versions": {k: v for k, v in versions().items() if k in ("python", "jax", "jaxlib")}}
    facts |= {"threads": measure.threads(), "revision": git_revision()}
    try:
        _print_rows(options, facts)
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print_rows(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    for row in BENCHES[options.name].rows(options):
        line = json.dumps({"name": options.name, **row, **facts})
        print(line, flush=True)
        if options.out:
            path = epath.Path(options.out)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    keep_freed_pages()
    sys.exit(main())
