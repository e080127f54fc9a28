# SPDX-License-Identifier: Apache-2.0
"""Result tables inside a Markdown document, between markers that name their file.

<!-- table: headline/tome/table_summary.md -->
...
<!-- end -->
"""

from __future__ import annotations

import json
import re

from etils import epath
from tabulate import tabulate

_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: epath.Path) -> str:
    """`text` with every marked block holding the file that it names under `results`; blocks of missing files stay."""

    def fill(match: re.Match[str]) -> str:
        path = results / match[2]
        return f"{match[1]}\n{path.read_text().strip()}\n\n{match[3]}" if path.exists() else match[0]

    return _BLOCK.sub(fill, text)


BENCH_COLUMNS = ("name", "shape", "part", "device", "threads", "dtype", "implied", "realised", "overhead")


def bench_summary(results: epath.Path) -> None:
    """Writes `bench/summary.md` from the rows that benchmarks appended to `bench/*.jsonl`; the newest row of a shape counts."""
    newest = {}
    for path in sorted((results / "bench").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if "density" in row:
                row["shape"] += f", density {row['density']:g}"
            # What a row is of: a part of a model, or one of the methods that a benchmark compares.
            row["part"] = row.get("part", row.get("method", "-"))
            newest[tuple(row.get(column) for column in BENCH_COLUMNS[:6])] = row
    if newest:
        body = [[row.get(column, "-") for column in BENCH_COLUMNS] for row in newest.values()]
        (results / "bench" / "summary.md").write_text(tabulate(body, BENCH_COLUMNS, tablefmt="github") + "\n")


def update(document: epath.Path, results: epath.Path) -> None:
    """Renews the marked blocks of `document` in place."""
    bench_summary(results)
    document.write_text(render(document.read_text(), results))


if __name__ == "__main__":
    # python -m experiments.studies.readme: renews README.md from results/.
    update(epath.Path("README.md"), epath.Path("results"))
