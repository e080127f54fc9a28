# SPDX-License-Identifier: Apache-2.0
"""Runs studies and writes their tables, plots and rows to `results/SUITE/STUDY/`.

    python -m experiments.reproduce
    python -m experiments.reproduce --only=tome
    python -m experiments.reproduce --suite=quick --only=tome,mrt5
    python -m experiments.reproduce --suite=quick --only=mrt5 --data text=FOLDER

`headline` takes about 20 minutes on four CPU cores; `quick` 20 to 60 minutes a study on one or two, with three seeds; `full`
is for an accelerator. Starting the same command again continues: runs resume from their checkpoints, rows beside them are
kept. Rows in `results/` alone, as a clone brings them, are made again.

`--data NAME=FOLDER` gives a study data that are not embedded; without them its tables say "not run".
  text     files LANG_*.txt.gz with text in several languages (mrt5)
  cifar10  a folder of TensorFlow Datasets that holds cifar10 in array_record form (diffrate, acm)
  imagenet a folder of TensorFlow Datasets that holds imagenet2012 in array_record form (diffrate)
  imagenet_checkpoints  a folder of checkpoints with config.json and safetensors, one folder each (diffrate)
"""

from __future__ import annotations

import argparse
import sys
import time

import jax
from etils import epath

from experiments.memory import keep_freed_pages
from experiments.studies import STUDIES
from experiments.studies.readme import update
from experiments.studies.study import Context
from experiments.train import Interrupted, quiet_logs

SUITES = ("headline", "quick", "full")
DATA = ("text", "cifar10", "imagenet", "imagenet_checkpoints")


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments and runs the studies; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--suite", choices=SUITES, default="headline")
    parser.add_argument("--only", default="", help=f"studies, comma separated: {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--results", default="results", help="where tables and plots go (default %(default)s)")
    parser.add_argument("--runs", default="runs", help="where training runs go (default %(default)s)")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=FOLDER", help="a data set that is not embedded; see above"
    )
    parser.add_argument("--readme", default="", help="also renew the result tables between the markers of this file")
    options = parser.parse_args(argv)
    names = [name for name in options.only.split(",") if name] or list(STUDIES)
    if unknown := sorted(set(names) - set(STUDIES)):
        parser.error(f"no study is named {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    folders = dict(item.partition("=")[::2] for item in options.data)
    if unknown := sorted(name for name, folder in folders.items() if name not in DATA or not folder):
        parser.error(f"--data takes NAME=FOLDER with NAME one of {', '.join(DATA)}; got {', '.join(unknown)}")
    quiet_logs()
    # Runs of a study differ in seeds and rates, not in their programs, and most of a short run's time is compilation.
    jax.config.update("jax_compilation_cache_dir", str(epath.Path(options.runs) / "compiled"))
    started = time.time()

    def say(text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S', time.gmtime(time.time() - started))}] {text}", file=sys.stderr, flush=True)

    for index, name in enumerate(names, start=1):
        study = STUDIES[name]
        place = (options.suite, name)
        results, runs = (epath.Path(root).joinpath(*place) for root in (options.results, options.runs))
        say(f"study {index} of {len(names)}: {name} ({options.suite})")
        try:
            study.run(Context(name, options.suite, study.SUITES[options.suite], results, runs, say, folders))
        except Interrupted as reason:
            print(f"{reason}\nThe same command continues: python -m experiments.reproduce ...", file=sys.stderr)
            return reason.exit_code
        say(f"{name} is in {results}")
        for table in sorted(results.glob("*_summary.md")):
            print(table.read_text())
    if options.readme:
        update(epath.Path(options.readme), epath.Path(options.results))
    return 0


if __name__ == "__main__":
    keep_freed_pages()
    sys.exit(main())
