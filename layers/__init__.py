# SPDX-License-Identifier: Apache-2.0
"""Flax Linen modules: building blocks, learned gates, and the backbones."""
