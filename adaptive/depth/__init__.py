# SPDX-License-Identifier: Apache-2.0
"""How many layers run for a token. Importing the package enters its methods in the registry.

A depth method is called `(tokens, signals, **hyper)` and returns `[B, N, L]`, how much each layer's state counts in what a token
ends with: it sums to 1, and a token runs up to the last layer that counts.
"""

from adaptive.depth import exits, halting

__all__ = ["exits", "halting"]
