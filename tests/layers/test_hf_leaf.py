# SPDX-License-Identifier: Apache-2.0
"""The place of a parameter in a checkpoint: layouts by hand, and that reading undoes writing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layers.hf_leaf import Leaf


def test_a_query_kernel_is_held_transposed_with_its_heads_side_by_side():
    leaf = Leaf("query/kernel", ("q",), inputs=1)
    tensor = np.arange(24, dtype=np.float32).reshape(6, 4)  # [heads * head_dim, width]
    kernel = leaf.parameter([tensor], (4, 2, 3), np.float32)
    assert kernel[1, 1, 2] == tensor[1 * 3 + 2, 1]
    assert leaf.tensor_shape((4, 2, 3)) == (6, 4)


def test_an_output_kernel_has_two_input_axes():
    leaf = Leaf("out/kernel", ("o",), inputs=2)
    tensor = np.arange(24, dtype=np.float32).reshape(4, 6)  # [width, heads * head_dim]
    kernel = leaf.parameter([tensor], (2, 3, 4), np.float32)
    assert kernel[1, 2, 3] == tensor[3, 1 * 3 + 2]
    assert leaf.tensor_shape((2, 3, 4)) == (4, 6)


def test_a_stacked_parameter_has_a_tensor_for_each_layer():
    leaf = Leaf("mlp/kernel", ("a", "b"), inputs=1, stacked=True)
    tensors = [np.full((3, 2), layer, np.float32) for layer in (5, 7)]
    kernel = leaf.parameter(tensors, (2, 2, 3), np.float32)
    assert kernel[0].tolist() == [[5.0] * 3] * 2 and kernel[1].tolist() == [[7.0] * 3] * 2
    with pytest.raises(ValueError, match="shorter"):
        leaf.parameter(tensors[:1], (2, 2, 3), np.float32)


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=3).map(tuple),
    layers=st.integers(0, 3),
    plain=st.booleans(),
    data=st.data(),
)
def test_reading_undoes_writing(shape, layers, plain, data):
    inputs = 0 if plain else data.draw(st.integers(1, len(shape) - 1))
    leaf = Leaf("p", tuple(map(str, range(layers or 1))), inputs=inputs, stacked=layers > 0)
    whole = (layers, *shape) if layers else shape
    parameter = np.random.default_rng(0).standard_normal(whole).astype(np.float32)
    tensors = [leaf.tensor(parameter, index) for index in range(len(leaf.tensors))]
    assert {tensor.shape for tensor in tensors} == {leaf.tensor_shape(whole)}
    assert all(tensor.flags.c_contiguous for tensor in tensors)
    np.testing.assert_array_equal(leaf.parameter(tensors, whole, np.float32), parameter)
