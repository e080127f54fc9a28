# SPDX-License-Identifier: Apache-2.0
"""Which tokens survive, merged or pruned. Importing the package enters its methods in the registry.

Shared parts: `select` (scores to survivors), `match` (who is alike), `combine` (who joins whom to coefficients).
"""

from adaptive.reduction import (
    clustering,
    combine,
    cropr,
    diffrate,
    ficoco,
    match,
    pruning,
    select,
    token_transforming,
    tome,
)

__all__ = [
    "clustering",
    "combine",
    "cropr",
    "diffrate",
    "ficoco",
    "match",
    "pruning",
    "select",
    "token_transforming",
    "tome",
]
