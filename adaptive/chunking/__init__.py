# SPDX-License-Identifier: Apache-2.0
"""Bytes grouped into chunks. Importing the package enters its methods in the registry.

`chunks` holds what all share: where chunks start, their numbers and lengths, and the reduction that pools them.
"""

from adaptive.chunking import boundary_predictor, chunks, entropy, fixed, gbst, hnet

__all__ = ["boundary_predictor", "chunks", "entropy", "fixed", "gbst", "hnet"]
