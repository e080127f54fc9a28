# SPDX-License-Identifier: Apache-2.0
"""How many layers run for a token, and which. Importing the package enters its methods in the registry.

A method of kind "depth" is called `(tokens, signals, **hyper)` and returns `[B, N, L]`, how much each layer's state counts in
what a token ends with: it sums to 1. A method of kind "skipping" returns `[B, N, L]` bool, the layers that run for a token.
"""

from adaptive.depth import calm, mixture_of_depths, skip_decode

__all__ = ["calm", "mixture_of_depths", "skip_decode"]
