# SPDX-License-Identifier: Apache-2.0
"""The most similar partner of every row, without the matrix of all similarities."""

from pallas_kernels.bipartite_match.api import METRICS, STATISTICS, bipartite_match

__all__ = ["METRICS", "STATISTICS", "bipartite_match"]
