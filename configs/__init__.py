# SPDX-License-Identifier: Apache-2.0
"""Experiment configs, one folder a paper; each file has `get_config(arg)` and no logic."""
