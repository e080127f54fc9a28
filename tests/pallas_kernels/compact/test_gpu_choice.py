# SPDX-License-Identifier: Apache-2.0
"""Compaction on GPUs is XLA's gather: chosen by itself, and said when a kernel is asked for."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compact as compaction


def test_a_named_gpu_kernel_is_refused_and_the_best_there_is_the_gather(monkeypatch):
    values, packing = jnp.arange(24.0).reshape(2, 6, 2), compaction.pack(jnp.arange(12).reshape(2, 6) % 2 == 0, 4)
    for move, rows in ((compaction.compact, values), (compaction.expand, values[:, :4])):
        with pytest.raises(NotImplementedError, match="moves each row once; implementation='xla' is the one for GPUs"):
            move(rows, packing, implementation="gpu")
        expected = move(rows, packing, implementation="xla")
        with monkeypatch.context() as patch:
            patch.setattr("pallas_kernels.dispatch.preference", lambda: ("gpu", "xla"))
            np.testing.assert_array_equal(move(rows, packing), expected)
