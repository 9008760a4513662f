"""An ONNX graph under construction, with tensor sizes computed from the photo at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from service.artefact.contract import INPUT_NAME

OUTSIDE = 1 << 28
"""Row number of a neighbour outside the photo; later clipped to the row of zeros."""


class GraphBuilder:
    """Nodes and initializers, and methods that add one and return the new tensor's name.

    ``prefix``: of generated names.
    """

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._seen: dict[tuple[object, ...], str] = {}

    def emit(self, op: str, inputs: Sequence[str], name: str = "", **attributes: Any) -> str:  # noqa: ANN401
        """Add a node; its output is called ``name``, by default after the operator."""
        output = name or f"{self._prefix}{op}_{len(self.nodes)}"
        node = helper.make_node(op, list(inputs), [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def copy(self, node: NodeProto, inputs: Sequence[str], name: str = "") -> str:
        """Copy another graph's operator, with its attributes; see `emit`."""
        return self.emit(node.op_type, inputs, name, **attributes_of(node))

    def once(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:  # noqa: ANN401
        """Add a node unless the graph already has the same one; see `emit`."""
        key = (op, *inputs, repr(attributes))
        if key not in self._seen:
            self._seen[key] = self.emit(op, inputs, **attributes)
        return self._seen[key]

    def constant(self, value: object, dtype: DTypeLike) -> str:
        """Add an initializer unless the graph already has an equal one."""
        array = np.asarray(value, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._seen:
            self._seen[key] = f"{self._prefix}constant_{len(self.initializers)}"
            tensor = numpy_helper.from_array(array, self._seen[key])
            self.initializers[tensor.name] = tensor
        return self._seen[key]

    def make(self, name: str, interface: GraphProto) -> GraphProto:
        """Return the graph with the inputs and outputs of ``interface``."""
        initializers = list(self.initializers.values())
        return helper.make_graph(
            self.nodes, name, list(interface.input), list(interface.output), initializers
        )

    def rows(self, name: str, channels: int) -> str:
        """Reshape a tensor to ``(N*h*w, channels)``."""
        return self.once("Reshape", [name, self.constant([-1, channels], np.int64)])

    def grid(self, stride: int) -> str:
        """Add the shape ``[N, h/stride, w/stride, -1]``, int64."""
        rest = self.constant([-1], np.int64)
        return self.once("Concat", [self._sizes(stride), rest], axis=0)

    def neighbours(self, offsets: NDArray[np.int64], step: int, stride: int) -> str:
        """Add the row numbers ``(N*h*w*k*k,)`` that a kernel reads, in the order of its weights.

        ``offsets``: ``(k,)`` cells from the kernel's centre, along either axis; ``step``: cells
        from one output to the next; ``stride``: of the input. Neighbours outside the photo have
        the number ``N*h*w``: a row of zeros after the last row.
        """
        photos, height, width = (self._size(stride, axis) for axis in range(3))
        cells = self.once("Mul", [height, width])
        down = self._along(1, offsets.reshape(1, 1, 1, -1, 1), step, stride, times=width)
        right = self._along(2, offsets.reshape(1, 1, 1, 1, -1), step, stride)
        photo = self.once("Mul", [self._numbers(photos, 0), cells])
        rows = self.once("Add", [self.once("Add", [photo, down]), right])
        clipped = self.once("Min", [rows, self.once("Mul", [photos, cells])])
        return self.once("Reshape", [clipped, self.constant([-1], np.int64)])

    def _along(
        self, axis: int, offsets: NDArray[np.int64], step: int, stride: int, times: str = ""
    ) -> str:
        """Positions along one axis, multiplied by ``times``; `OUTSIDE` where there is no cell."""
        places = self._numbers(self._size(stride * step, axis), axis)
        if step > 1:
            places = self.once("Mul", [places, self.constant(step, np.int32)])
        places = self.once("Add", [places, self.constant(offsets, np.int32)])
        low = self.once("Less", [places, self.constant(0, np.int32)])
        high = self.once("GreaterOrEqual", [places, self._size(stride, axis)])
        outside = self.once("Or", [low, high])
        if times:
            places = self.once("Mul", [places, times])
        return self.once("Where", [outside, self.constant(OUTSIDE, np.int32), places])

    def _numbers(self, count: str, axis: int) -> str:
        """``0 .. count - 1`` along one of five axes."""
        zero, one = self.constant(0, np.int32), self.constant(1, np.int32)
        shape = [-1 if index == axis else 1 for index in range(5)]
        numbers = self.once("Range", [zero, count, one])
        return self.once("Reshape", [numbers, self.constant(shape, np.int64)])

    def _size(self, stride: int, axis: int) -> str:
        """One element of `_sizes`, a scalar int32."""
        sizes = self.once("Cast", [self._sizes(stride)], to=TensorProto.INT32)
        return self.once("Gather", [sizes, self.constant(axis, np.int64)], axis=0)

    def _sizes(self, stride: int) -> str:
        """``[N, h/stride, w/stride]``, int64."""
        sizes = self.once("Shape", [INPUT_NAME], start=0, end=3)
        return self.once("Div", [sizes, self.constant([1, stride, stride], np.int64)])


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes by name, as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
