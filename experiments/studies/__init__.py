# SPDX-License-Identifier: Apache-2.0
"""Studies: each trains what it needs, measures, and draws its tables and plots from the rows it wrote.

A study is a module with a docstring, `SUITES` (settings by suite name) and `run(context)`.
"""

from __future__ import annotations

from experiments.studies import acm, diffrate, duo, mrt5, tome

STUDIES = {"tome": tome, "mrt5": mrt5, "diffrate": diffrate, "acm": acm, "duo": duo}

__all__ = ["STUDIES"]
