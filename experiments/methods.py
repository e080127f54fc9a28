# SPDX-License-Identifier: Apache-2.0
"""Lists every registered method.

python -m experiments.methods
python -m experiments.methods --kind=reduction --format=markdown
python -m experiments.methods tome
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys

from tabulate import tabulate

from adaptive import registry

COLUMNS = ("name", "adapts", "signals", "trained", "citation")


def table_rows(kind: str | None = None) -> list[dict[str, str]]:
    """One row for each method, of one kind or of all."""
    rows = []
    for name in registry.names(kind):
        record = registry.describe(name)
        rows.append(
            {
                "name": name,
                "adapts": registry.KINDS[record.kind],
                "signals": ", ".join(record.signals) or "-",
                "trained": record.trained,
                "citation": record.citation or "baseline",
            }
        )
    return rows


def show(name: str) -> str:
    """All that is known of one method, as text.

    Raises:
      KeyError: no such method.
    """
    record = registry.describe(name)
    hyper = ", ".join(f"{key}={value!r}" for key, value in record.hyper.items()) or "none"
    lines = [
        f"{record.name}: {registry.KINDS[record.kind]}",
        f"paper: {record.paper or '-'}",
        f"citation: {record.citation or 'baseline'}",
        f"signals: {', '.join(record.signals) or 'none'}; trained: {record.trained}; hyper-parameters: {hyper}",
        f"module: {record.function.__module__}",
        "",
        inspect.getdoc(record.function) or "",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments and prints; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", nargs="?", help="print everything about this method")
    parser.add_argument("--kind", choices=sorted(registry.KINDS), help="only methods that adapt this")
    parser.add_argument("--format", choices=("plain", "markdown", "json"), default="plain")
    options = parser.parse_args(argv)
    if options.method:
        try:
            print(show(options.method))
        except KeyError as error:
            print(f"error: {error.args[0]}", file=sys.stderr)
            return 2
        return 0
    rows = table_rows(options.kind)
    if options.format == "json":
        records = [dataclasses.asdict(registry.describe(row["name"])) for row in rows]
        print(json.dumps([{k: v for k, v in record.items() if k != "function"} for record in records], indent=1))
        return 0
    style = "github" if options.format == "markdown" else "simple"
    print(tabulate([[row[c] for c in COLUMNS] for row in rows], headers=COLUMNS, tablefmt=style))
    return 0


if __name__ == "__main__":
    sys.exit(main())
