# SPDX-License-Identifier: Apache-2.0
"""Embeddings of patches, tokens and positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.embed import ConvStem, LearnedPositions, PatchEmbed, TokenEmbed, grid_coords, patchify, sincos_2d


def test_patches_are_embedded_as_by_a_strided_convolution():
    pixels = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    layer = PatchEmbed(4, 5)
    variables = nn.unbox(layer.init(jax.random.key(0), pixels))
    kernel = variables["params"]["projection"]["kernel"].reshape(4, 4, 3, 5)
    convolved = jax.lax.conv_general_dilated(
        pixels, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    np.testing.assert_allclose(layer.apply(variables, pixels), convolved.reshape(2, 6, 5), rtol=1e-4, atol=1e-5)


def test_patches_run_row_by_row_as_their_coordinates_say():
    pixels = np.zeros((1, 6, 8, 1), np.float32)
    for (row, column), value in np.ndenumerate(np.arange(12).reshape(3, 4)):
        pixels[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = value
    values = patchify(jnp.asarray(pixels), 2)[0, :, 0]
    np.testing.assert_array_equal(values, grid_coords(3, 4) @ np.asarray([4, 1]))


@pytest.mark.parametrize("shape", [(1, 7, 8, 3), (1, 8, 9, 3), (8, 8, 3)])
def test_images_that_are_no_whole_number_of_patches_are_refused(shape):
    with pytest.raises(ValueError, match="sides divisible by 4"):
        patchify(jnp.zeros(shape), 4)


def test_fixed_positions_tell_places_apart_and_have_one_norm():
    table = sincos_2d(5, 7, 16)
    assert table.shape == (35, 16)
    np.testing.assert_allclose(np.linalg.norm(table, axis=-1), np.sqrt(8), rtol=1e-6)
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert distance[~np.eye(35, dtype=bool)].min() > 0.1
    # Each half knows one coordinate only, and products depend on differences.
    np.testing.assert_array_equal(table[0, 8:], table[6, 8:])
    np.testing.assert_array_equal(table[0, :8], table[7, :8])
    np.testing.assert_allclose(table[0] @ table[8], table[16] @ table[24], rtol=1e-5)
    with pytest.raises(ValueError, match="divisible by 4; got 18"):
        sincos_2d(2, 2, 18)


def test_learned_positions_are_added_to_every_row_of_the_batch():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    boxed = LearnedPositions().init(jax.random.key(0), x)
    table = nn.unbox(boxed)["params"]["embedding"]
    assert table.shape == (3, 4) and boxed["params"]["embedding"].names == ("position", "embed")
    np.testing.assert_allclose(LearnedPositions().apply(nn.unbox(boxed), x), x + table, rtol=1e-6)


def test_token_embedding_looks_up_and_scores_with_one_table():
    layer, ids = TokenEmbed(11, 4), np.asarray([[3, 0, 10]])
    boxed = layer.init(jax.random.key(0), ids)
    variables = nn.unbox(boxed)
    table = variables["params"]["embedding"]
    assert boxed["params"]["embedding"].names == ("vocab", "embed")
    x = layer.apply(variables, ids)
    np.testing.assert_array_equal(x, table[ids])
    logits = layer.apply(variables, x, method="attend")
    np.testing.assert_allclose(logits, np.asarray(x) @ np.asarray(table).T, rtol=1e-4, atol=1e-5)
    half = layer.clone(dtype=jnp.bfloat16)
    assert half.apply(variables, ids).dtype == jnp.bfloat16
    assert half.apply(variables, x, method="attend").dtype == jnp.float32
    with pytest.raises(TypeError, match="must be integers; got float32"):
        layer.apply(variables, np.zeros((1, 3), np.float32))


def test_a_stem_is_its_convolutions_norms_and_a_linear_map():
    pixels = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    layer = ConvStem((4, 6), 5)
    params = nn.unbox(layer.init(jax.random.key(0), pixels))["params"]
    x = pixels
    for index in range(2):
        # The window of output (i, j) begins at (2 i, 2 j): with stride 2 the padding lies behind.
        padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        kernel = np.asarray(params[f"convolution_{index}"]["kernel"])
        y = sum(
            padded[:, a : a + 2 * rows : 2, b : b + 2 * columns : 2] @ kernel[a, b] for a in range(3) for b in range(3)
        )
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        x = np.maximum(y, 0)
    want = x.reshape(2, 6, 6) @ np.asarray(params["projection"]["kernel"])
    np.testing.assert_allclose(jax.jit(layer.apply)({"params": params}, pixels), want, rtol=1e-4, atol=1e-4)


def test_a_stem_refuses_images_that_it_cannot_halve():
    with pytest.raises(ValueError, match="sides divisible by 4, as 2 convolutions"):
        ConvStem((4, 6), 5).init(jax.random.key(0), jnp.zeros((1, 8, 10, 3)))
