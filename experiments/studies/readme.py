# SPDX-License-Identifier: Apache-2.0
"""Result tables inside a Markdown document, between markers that name their file.

<!-- table: headline/tome/table_summary.md -->
...
<!-- end -->
"""

from __future__ import annotations

import re

from etils import epath

_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str, results: epath.Path) -> str:
    """`text` with every marked block holding the file that it names under `results`; blocks of missing files stay."""

    def fill(match: re.Match[str]) -> str:
        path = results / match[2]
        return f"{match[1]}\n{path.read_text().strip()}\n\n{match[3]}" if path.exists() else match[0]

    return _BLOCK.sub(fill, text)


def update(document: epath.Path, results: epath.Path) -> None:
    """Renews the marked blocks of `document` in place."""
    document.write_text(render(document.read_text(), results))
