# SPDX-License-Identifier: Apache-2.0
"""How much of a layer runs for a token. Importing the package enters its methods in the registry.

A width method is called `(tokens, signals, **hyper)` and returns `[B, N, K]` of 0 and 1, the units of the layer that each token
runs; in training the gradient passes straight through.
"""

from adaptive.width import acm, duo, dynamic, mc_moe, moefication

__all__ = ["acm", "duo", "dynamic", "mc_moe", "moefication"]
