# SPDX-License-Identifier: Apache-2.0
"""Kernels: each operation is a folder with its reference, its implementations and its dispatcher."""
