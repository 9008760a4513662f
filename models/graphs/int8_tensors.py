"""Tensors and convolutions as `models.graphs.int8` describes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

Range = tuple[float, float]


@dataclass(frozen=True)
class Quantized:
    """A uint8 tensor ``name`` of shape ``[N, h/stride, w/stride, channels]``.

    Its real values are ``scale * (value - zero_point)``. Stride 0 is one cell for the whole photo.
    """

    name: str
    channels: int
    stride: int
    scale: float
    zero_point: int

    @classmethod
    def of_range(cls, name: str, channels: int, stride: int, limits: Range) -> Self:
        """Return the tensor with the smallest scale that covers ``limits`` and an exact zero."""
        low, high = min(limits[0], 0.0), max(limits[1], 0.0)
        scale = (high - low) / 255 or 1.0
        return cls(name, channels, stride, scale, round(-low / scale))


@dataclass(frozen=True)
class Convolution:
    """One convolution: ``weights (O, I, k, k)`` times ``scale (O,)``, plus ``bias (O,)``."""

    name: str
    weights: TensorProto
    scale: NDArray[np.float64]
    bias: NDArray[np.float64]
    kernel: int
    stride: int
    dilation: int

    @property
    def padding(self) -> int:
        """Cells of zeros on every side."""
        return self.dilation * (self.kernel // 2)
