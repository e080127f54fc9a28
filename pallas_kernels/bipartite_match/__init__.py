# SPDX-License-Identifier: Apache-2.0
"""The most similar partner of every row, without the matrix of all similarities, and the merge of the best pairs."""

from pallas_kernels.bipartite_match.api import METRICS, STATISTICS, bipartite_match
from pallas_kernels.bipartite_match.pairs import Pairs, pair_up

__all__ = ["METRICS", "STATISTICS", "Pairs", "bipartite_match", "pair_up"]
