# SPDX-License-Identifier: Apache-2.0
"""Bytes deleted by a gate in an encoder. Importing the package enters its methods in the registry."""

from adaptive.deletion import baselines, controller, gate, objective

__all__ = ["baselines", "controller", "gate", "objective"]
