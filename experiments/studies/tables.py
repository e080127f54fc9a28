# SPDX-License-Identifier: Apache-2.0
"""Tables from rows: Markdown, LaTeX and CSV by one description, mean and deviation over seeds by one function."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from tabulate import tabulate

# Instead of a figure, where a method has no setting at the compute or the length that others are compared at.
BEYOND = "beyond its reach"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      head: its title; value: key of a row, or a function of it; digits: after the point, for numbers.
      receipt: stands in the full table only (command, hash, seed), not in the summary.
    """

    head: str
    value: str | Callable[[Mapping[str, Any]], Any]
    digits: int = 2
    receipt: bool = False

    def of(self, row: Mapping[str, Any]) -> Any:
        """The value in a row; None where there is none."""
        return self.value(row) if callable(self.value) else row.get(self.value)


RECEIPTS = (
    Column("config", "config_hash", receipt=True),
    Column("seed", "seed", receipt=True),
    Column("command", "command", receipt=True),
)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(values: Sequence[Any], digits: int) -> str:
    """One cell from the values of all seeds: "not run", a text, `1.23`, `1.23 ± 0.04`, or `1.23 (2 of 3), a text`."""
    known = [value for value in values if value is not None]
    if not known:
        return "not run"
    # Whole numbers (a seed, a count) are not averaged, unless others beside them are not whole.
    numeric = (int, float) if any(isinstance(value, float) for value in known) else ()
    numbers = [value for value in known if isinstance(value, numeric)]
    texts = list(dict.fromkeys(str(value) for value in known if not isinstance(value, numeric)))
    if not numbers:
        return ", ".join(texts)
    mean, deviation = spread(numbers)
    text = f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if len(numbers) > 1 else "")
    return ", ".join([f"{text} ({len(numbers)} of {len(known)})", *texts]) if texts else text


def grouped(rows: Iterable[Mapping[str, Any]], key: str = "group") -> list[list[Mapping[str, Any]]]:
    """Rows of all seeds of the same setting together, in the order of first appearance."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return list(groups.values())


def cells(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> list[list[str]]:
    """The body of a table: one line for each group of rows, one cell for each column."""
    return [[cell([column.of(row) for row in group], column.digits) for column in columns] for group in grouped(rows)]


def write(
    directory: epath.Path,
    name: str,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    receipts: Sequence[Column] = RECEIPTS,
) -> None:
    """Writes `name.md`, `name.tex`, `name.csv` (with receipts) and `name_summary.md` (without) to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    full = (*columns, *receipts)
    seeds = max(len(group) for group in grouped(rows))
    note = f"{title} {'One seed (n = 1).' if seeds == 1 else f'Mean ± standard deviation over n = {seeds} seeds.'}"
    body, heads = cells(rows, full), [column.head for column in full]
    (directory / f"{name}.md").write_text(f"{note}\n\n{tabulate(body, heads, tablefmt='github')}\n")
    (directory / f"{name}_summary.md").write_text(
        f"{note}\n\n{tabulate(cells(rows, columns), [column.head for column in columns], tablefmt='github')}\n"
    )
    latex = tabulate(body, heads, tablefmt="latex_booktabs", disable_numparse=True)
    (directory / f"{name}.tex").write_text(f"% {note}\n{latex}\n")
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heads, *body])
    (directory / f"{name}.csv").write_text(buffer.getvalue())
