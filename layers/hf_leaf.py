# SPDX-License-Identifier: Apache-2.0
"""Where a parameter of a module lies in a checkpoint of another library, and how its layout differs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of a module and the tensors that it is made from.

    Attributes:
      path: of the parameter, as in "encoder_0/attention/query/kernel".
      tensors: names in the checkpoint: one for each layer of a stacked parameter, else a single one.
      inputs: how many axes of a kernel are inputs, of a linear map that the checkpoint holds as `[outputs, inputs]`; 0 for a
        parameter that is held as it stands.
      stacked: the parameter has a leading axis of layers.
      ones: leading axes of length 1 that the tensors have and the parameter has not.
      flat: the tensors hold a parameter of several axes as one axis (biases of heads).
    """

    path: str
    tensors: tuple[str, ...]
    inputs: int = 0
    stacked: bool = False
    ones: int = 0
    flat: bool = False

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor when the parameter has this shape."""
        part = shape[1:] if self.stacked else shape
        if not self.inputs:
            return (1,) * self.ones + ((math.prod(part),) if self.flat else part)
        return math.prod(part[self.inputs :]), math.prod(part[: self.inputs])

    def parameter(self, tensors: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The parameter of this shape, from its tensors in order; one of them is needed at a time."""
        result = np.empty(shape, dtype)
        parts = result if self.stacked else result[None]
        for part, tensor in zip(parts, tensors, strict=True):
            part[...] = (tensor.T if self.inputs else tensor).reshape(part.shape)
        return result

    def tensor(self, parameter: np.ndarray, index: int) -> np.ndarray:
        """The tensor `tensors[index]` of the parameter, contiguous."""
        part = parameter[index] if self.stacked else parameter
        if not self.inputs:
            return np.ascontiguousarray(part.reshape((1,) * self.ones + ((-1,) if self.flat else part.shape)))
        return np.ascontiguousarray(part.reshape(math.prod(part.shape[: self.inputs]), -1).T)


@dataclasses.dataclass(frozen=True)
class PatchLeaf(Leaf):
    """The kernel `[p p c, D]` of a patch embedding, which the checkpoint holds as a convolution `[D, c, p, p]`.

    Attributes:
      size: p.
    """

    size: int = 1

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the convolution when the kernel has this shape."""
        return shape[1], shape[0] // self.size**2, self.size, self.size

    def parameter(self, tensors: Iterable[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """The kernel of this shape: rows of a patch, then columns, then channels."""
        (convolution,) = tensors
        return np.ascontiguousarray(convolution.transpose(2, 3, 1, 0).reshape(shape)).astype(dtype)

    def tensor(self, parameter: np.ndarray, index: int) -> np.ndarray:
        """The convolution."""
        del index
        width = parameter.shape[1]
        return np.ascontiguousarray(parameter.reshape(self.size, self.size, -1, width).transpose(3, 2, 0, 1))
