# SPDX-License-Identifier: Apache-2.0
"""Which keys a query attends to: patterns and choices, each a list of key blocks for `block_sparse_attention`."""
