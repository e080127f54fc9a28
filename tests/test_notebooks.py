# SPDX-License-Identifier: Apache-2.0
"""Notebooks run from top to bottom and are stored without outputs."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# These train.
LONG = ("acm.ipynb", "mrt5.ipynb")


# The kernel's own event loop and sockets warn when they are collected (ipykernel 7, pyzmq 27; seen 2026-11).
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] if path.name in LONG else []) for path in NOTEBOOKS],
    ids=lambda path: path.name,
)
def test_it_runs_and_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in out.get("data", {}) for cell in outputs for out in cell)
