# SPDX-License-Identifier: Apache-2.0
"""Which tokens survive, merged or pruned. Importing the package enters its methods in the registry.

Shared parts: `select` (scores to survivors), `match` (who is alike), `combine` (who joins whom to coefficients).
"""

from adaptive.reduction import combine, diffrate, match, pruning, select, tome

__all__ = ["combine", "diffrate", "match", "pruning", "select", "tome"]
