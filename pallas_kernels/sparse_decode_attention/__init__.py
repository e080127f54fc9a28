# SPDX-License-Identifier: Apache-2.0
"""Attention of one or a few query rows over selected pages or tokens of a cache, ragged by sequence and by key head."""

from pallas_kernels.sparse_decode_attention.api import pack_tokens, sparse_decode_attention

__all__ = ["pack_tokens", "sparse_decode_attention"]
