# SPDX-License-Identifier: Apache-2.0
"""Which path through a model each token or sequence should take: oracles, searches, and how hard a token is."""
