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
      flat: the checkpoint holds it with a single axis (biases of projections to heads).
    """

    path: str
    tensors: tuple[str, ...]
    inputs: int = 0
    stacked: bool = False
    flat: bool = False

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor when the parameter has this shape."""
        part = shape[1:] if self.stacked else shape
        if self.flat:
            return (math.prod(part),)
        if not self.inputs:
            return part
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
        if self.flat:
            return np.ascontiguousarray(part.reshape(-1))
        if not self.inputs:
            return np.ascontiguousarray(part)
        return np.ascontiguousarray(part.reshape(math.prod(part.shape[: self.inputs]), -1).T)
