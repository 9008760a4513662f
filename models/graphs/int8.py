"""Rewrite an exported network as int8 for ONNX Runtime's CPU kernels.

ONNX Runtime's own quantiser keeps every convolution a convolution. This one uses the fast kernels:

- every tensor is NHWC, so that none is transposed;
- normalisation is folded into the first convolution, which reads the image's bytes, four pixels at
  a time, because three channels are too few for the fast kernels;
- a convolution with a long sum is one matrix product (``QGemm``), whose kernels use AMX where
  available; a 3x3 kernel first gathers its nine neighbours into one row.

The graph has no weights of its own. ONNX Runtime reads the float file's weights as external data
and rounds them to int8 while it loads the graph: one set of weights, two precisions.

Arithmetic: Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018). Operators: ONNX, and ``docs/ContribOperators.md`` in
ONNX Runtime's repository for those of its domain ``com.microsoft``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from models.graphs.builder import GraphBuilder, attributes_of
from models.graphs.int8_tensors import Convolution, Quantized, Range
from models.graphs.network_file import FloatNetwork, GraphError
from service.artefact.contract import INPUT_NAME, OUTPUT_NAME

CONTRIB = "com.microsoft"
OPSETS = (helper.make_opsetid("", 18), helper.make_opsetid(CONTRIB, 1))

GEMM_MIN_CHANNELS = {1: 512, 3: 256}
"""Input channels from which a 1x1 or 3x3 kernel runs faster as a matrix product."""

PIXELS = 4
"""Pixels that form one cell of 12 channels for the first convolution."""


class GraphWriter:
    """Writes the int8 graph of ``source``.

    ``ranges`` maps the float graph's tensors to their smallest and largest calibration values. The
    int8 file must be in the float network's folder.
    """

    def __init__(self, source: FloatNetwork, ranges: Mapping[str, Range]) -> None:
        self._source = source
        self._ranges = ranges
        self._constants = {tensor.name: tensor for tensor in source.graph.initializer}
        self._makers = {name: node for node in source.graph.node for name in node.output}
        self._tensors: dict[str, Quantized] = {}
        self._graph = GraphBuilder()
        self._logits = dict.fromkeys(self._names_of_logits(), "")
        """Names of float32 tensors ``[N, h, w, classes]``, by their names in the float graph."""

    def write(self) -> GraphProto:
        """Return the graph, with the float graph's input and output.

        Raises:
            GraphError: the network has an operator or a form that is not supported in int8.
        """
        makers = {
            "Conv": self._conv,
            "MaxPool": self._max_pool,
            "Add": self._add,
            "Concat": self._concat,
            "ReduceMean": self._mean,
            "Resize": self._resize,
        }
        for node in self._source.graph.node:
            if node.op_type in makers:
                makers[node.op_type](node)
            # These are read with a convolution: normalisation and weights before it, ReLU after.
            elif node.op_type not in {"Relu", "Transpose", "Cast", "Sub", "Div", "Mul"}:
                raise GraphError(f"{node.output[0]}: cannot quantise {node.op_type}")
        logits = self._logits[OUTPUT_NAME]
        self._graph.emit("Transpose", [logits], OUTPUT_NAME, perm=[0, 3, 1, 2])
        return self._graph.make("int8", self._source.graph)

    # ---- the float graph's operators -------------------------------------------------------------

    def _conv(self, node: NodeProto) -> None:
        conv = self._read_convolution(node)
        channels = len(conv.bias)
        if conv.name in self._logits:
            self._logits[conv.name] = self._predict(conv, self._tensors[node.input[0]])
        elif node.input[0] not in self._tensors:
            self._first_conv(conv, node)
        else:
            x = self._tensors[node.input[0]]
            y = self._output(conv.name, channels, x.stride * conv.stride)
            # For a strided 1x1 kernel, gathering the rows costs more than it saves.
            gather_pays = conv.kernel > 1 or conv.stride == 1
            if x.stride and gather_pays and x.channels >= GEMM_MIN_CHANNELS[conv.kernel]:
                self._gemm(conv, x, y)
            else:
                self._plain_conv(conv, x, y)

    def _plain_conv(self, conv: Convolution, x: Quantized, y: Quantized) -> None:
        weights, scales = self._int8_weights(conv, as_matrix=False)
        self._graph.emit(
            "QLinearConv",
            [
                *self._operand(x),
                *self._weight_operand(weights, scales),
                *self._meaning(y),
                self._int32_bias(conv.bias, x.scale * scales),
            ],
            y.name,
            domain=CONTRIB,
            channels_last=1,
            kernel_shape=[conv.kernel] * 2,
            pads=[conv.padding] * 4,
            strides=[conv.stride] * 2,
            dilations=[conv.dilation] * 2,
        )

    def _gemm(self, conv: Convolution, x: Quantized, y: Quantized) -> None:
        """A convolution as ``rows (N*h*w, k*k*I) @ weights (k*k*I, O)``."""
        weights, scales = self._int8_weights(conv, as_matrix=True)
        rows = self._graph.rows(x.name, x.channels)
        if conv.kernel > 1:
            zeros = self._graph.constant(np.full((1, x.channels), x.zero_point), np.uint8)
            padded = self._graph.once("Concat", [rows, zeros], axis=0)
            offsets = np.arange(-conv.padding, conv.padding + 1, conv.dilation)
            neighbours = self._graph.neighbours(offsets, conv.stride, x.stride)
            rows = self._graph.emit("Gather", [padded, neighbours], axis=0)
            rows = self._graph.rows(rows, conv.kernel**2 * x.channels)
        product = self._graph.emit(
            "QGemm",
            [
                rows,
                *self._meaning(x),
                *self._weight_operand(weights, scales),
                self._int32_bias(conv.bias, x.scale * scales),
                *self._meaning(y),
            ],
            domain=CONTRIB,
        )
        self._graph.emit("Reshape", [product, self._graph.grid(y.stride)], y.name)

    def _first_conv(self, conv: Convolution, node: NodeProto) -> None:
        """The 7x7 convolution of stride 2 on the image's bytes, with normalisation folded in.

        Four pixels form one cell of 12 channels, so that ``(w/4)`` cells become ``(w/4)`` cells of
        two output pixels: seven rows of three cells cover both. Reshaping is free in NHWC.
        """
        if (conv.kernel, conv.stride, conv.dilation) != (7, 2, 1):
            raise GraphError(f"{conv.name}: the first convolution is not 7x7 of stride 2")
        mean, std = self._normalization(node)
        values = _array(conv.weights) * conv.scale[:, None, None, None] / std[:, None, None]
        outputs = len(conv.bias)
        cells = np.zeros((2, outputs, PIXELS, 3, 7, 3))  # (of two, O, of four, RGB, rows, cells)
        for pixel in range(2):
            for column in range(7):
                offset = 2 * pixel + column - 3  # from the first pixel of the middle cell
                cell, within = divmod(offset + PIXELS, PIXELS)
                cells[pixel, :, within, :, :, cell] = values[:, :, :, column]
        kernel = cells.reshape(2 * outputs, PIXELS * 3, 7, 3)
        scales = _scale_of(kernel)
        weights = np.rint(kernel / scales[:, None, None, None])
        # Padding is one zero point for all three colours: close to each colour's mean, not equal.
        zero_point = round(float(mean.mean()))
        bias = conv.bias + (values.sum(axis=(2, 3)) * (zero_point - mean)).sum(axis=1)
        y = self._output(conv.name, outputs, 2)
        x = Quantized(INPUT_NAME, 3, 1, 1.0, zero_point)
        by_four = self._graph.constant([0, 0, -1, PIXELS * 3], np.int64)
        pairs = self._graph.emit(
            "QLinearConv",
            [
                self._graph.emit("Reshape", [INPUT_NAME, by_four]),
                *self._meaning(x),
                *self._weight_operand(self._graph.constant(weights, np.int8), scales),
                *self._meaning(y),
                self._int32_bias(np.tile(bias, 2), scales),
            ],
            domain=CONTRIB,
            channels_last=1,
            kernel_shape=[7, 3],
            pads=[3, 1, 3, 1],
            strides=[2, 1],
        )
        self._graph.emit(
            "Reshape", [pairs, self._graph.constant([0, 0, -1, outputs], np.int64)], y.name
        )

    def _predict(self, conv: Convolution, x: Quantized) -> str:
        """A classifier, a 1x1 convolution, with exact sums."""
        weights, scales = self._int8_weights(conv, as_matrix=True)
        sums = self._graph.emit(
            "MatMulInteger",
            [x.name, weights, self._meaning(x)[1], self._weight_operand(weights, scales)[2]],
        )
        real = self._graph.emit("Cast", [sums], to=TensorProto.FLOAT)
        scaled = self._graph.emit("Mul", [real, self._graph.constant(x.scale * scales, np.float32)])
        return self._graph.emit("Add", [scaled, self._graph.constant(conv.bias, np.float32)])

    def _max_pool(self, node: NodeProto) -> None:
        x = self._tensors[node.input[0]]
        attributes = attributes_of(node)
        step = attributes["strides"][0]
        # The largest uint8 value stands for the largest real value.
        y = Quantized(node.output[0], x.channels, x.stride * step, x.scale, x.zero_point)
        self._tensors[node.output[0]] = y
        keep = {key: attributes[key] for key in ("kernel_shape", "pads", "strides")}
        self._graph.emit("NhwcMaxPool", [x.name], y.name, domain=CONTRIB, **keep)

    def _add(self, node: NodeProto) -> None:
        if node.output[0] in self._logits:
            parts = [self._logits[name] for name in node.input]
            self._logits[node.output[0]] = self._graph.emit("Add", parts)
            return
        a, b = (self._tensors[name] for name in node.input)
        y = self._output(node.output[0], a.channels, max(a.stride, b.stride))
        self._graph.emit(
            "QLinearAdd",
            [*self._operand(a), *self._operand(b), *self._meaning(y)],
            y.name,
            domain=CONTRIB,
        )

    def _concat(self, node: NodeProto) -> None:
        parts = [self._tensors[name] for name in node.input]
        y = self._output(node.output[0], sum(part.channels for part in parts), parts[0].stride)
        operands = [name for part in parts for name in self._operand(part)]
        self._graph.emit(
            "QLinearConcat", [*self._meaning(y), *operands], y.name, domain=CONTRIB, axis=3
        )

    def _mean(self, node: NodeProto) -> None:
        x = self._tensors[node.input[0]]
        y = self._output(node.output[0], x.channels, 0)
        self._graph.emit(
            "QLinearGlobalAveragePool",
            [*self._operand(x), *self._meaning(y)],
            y.name,
            domain=CONTRIB,
            channels_last=1,
        )

    def _resize(self, node: NodeProto) -> None:
        _, _, *factors = _array(self._constants[node.input[2]])
        step = int(factors[0])
        if factors != [step, step]:
            raise GraphError(f"{node.output[0]}: only integer factors, equal along both axes")
        scales = self._graph.constant([1, step, step, 1], np.float32)
        attributes = attributes_of(node)
        if node.output[0] in self._logits:
            small = self._logits[node.input[0]]
            large = self._graph.emit("Resize", [small, "", scales], **attributes)
            self._logits[node.output[0]] = large
            return
        x = self._tensors[node.input[0]]
        if x.stride % step:
            raise GraphError(f"{node.output[0]}: finer than the photo's pixels")
        y = Quantized(node.output[0], x.channels, x.stride // step, x.scale, x.zero_point)
        self._tensors[node.output[0]] = y
        self._graph.emit("Resize", [x.name, "", scales], y.name, **attributes)

    # ---- reading the float graph -----------------------------------------------------------------

    def _names_of_logits(self) -> Iterator[str]:
        """The output and the tensors interpolated and summed to it: the skips' predictions."""
        names = [OUTPUT_NAME]
        while names:
            name = names.pop()
            yield name
            maker = self._makers[name]
            if maker.op_type in ("Add", "Resize"):
                names += [one for one in maker.input if one in self._makers]

    def _read_convolution(self, node: NodeProto) -> Convolution:
        """Read a convolution of `models.stages.export`: weights, or fp16 weights times a scale."""
        attributes = attributes_of(node)
        if node.input[1] in self._constants:
            # The exporter folds the smallest ones itself.
            weights = self._constants[node.input[1]]
            scale = np.ones(weights.dims[0])
        else:
            cast, factor = self._makers[node.input[1]].input
            weights = self._constants[self._makers[cast].input[0]]
            scale = _array(self._constants[factor]).ravel()
        # The exporter drops a bias of zeros.
        bias = np.zeros(len(scale))
        if len(node.input) == 3:
            bias = _array(self._constants[node.input[2]])
        conv = Convolution(
            node.output[0],
            weights,
            scale,
            bias,
            *(attributes[key][0] for key in ("kernel_shape", "strides", "dilations")),
        )
        if attributes["group"] != 1 or attributes["pads"] != [conv.padding] * 4:
            raise GraphError(f"{conv.name}: only dense convolutions of the same size")
        return conv

    def _normalization(self, node: NodeProto) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and standard deviation, ``(3,)`` in [0, 255], of the first convolution's input."""
        divide = self._makers[node.input[0]]
        subtract = self._makers[divide.input[0]]
        if (divide.op_type, subtract.op_type) != ("Div", "Sub"):
            raise GraphError(f"{node.output[0]}: its input is not the normalised image")
        constants = (self._constants[subtract.input[1]], self._constants[divide.input[1]])
        mean, std = (_array(constant).ravel() for constant in constants)
        return mean, std

    def _output(self, name: str, channels: int, stride: int) -> Quantized:
        """Name an operator's output, merged with a ReLU that is its only reader."""
        readers = [node for node in self._source.graph.node if name in node.input]
        if [node.op_type for node in readers] == ["Relu"]:
            # With a range that starts at 0, saturation computes the ReLU.
            name = readers[0].output[0]
        y = Quantized.of_range(name, channels, stride, self._ranges[name])
        self._tensors[name] = y
        return y

    # ---- quantised operands ----------------------------------------------------------------------

    def _meaning(self, tensor: Quantized) -> list[str]:
        return [
            self._graph.constant(tensor.scale, np.float32),
            self._graph.constant(tensor.zero_point, np.uint8),
        ]

    def _operand(self, tensor: Quantized) -> list[str]:
        return [tensor.name, *self._meaning(tensor)]

    def _weight_operand(self, weights: str, scales: NDArray[np.float64]) -> list[str]:
        zeros = self._graph.constant(np.zeros(len(scales)), np.int8)
        return [weights, self._graph.constant(scales, np.float32), zeros]

    def _int32_bias(self, bias: NDArray[np.float64], scales: NDArray[np.float64]) -> str:
        limit = 2**31 - 1
        return self._graph.constant(np.rint(bias / scales).clip(-limit, limit), np.int32)

    def _int8_weights(
        self, conv: Convolution, *, as_matrix: bool
    ) -> tuple[str, NDArray[np.float64]]:
        """Weights as ``(O, I, k, k)`` or ``(k*k*I, O)`` int8, and their scales ``(O,)``.

        The fp16 weights are rounded without the BatchNorm's factor, which becomes part of the
        scale. A scale is positive, so the factor's sign goes into the weights.
        """
        steps = _scale_of(_array(conv.weights))
        steps = np.where(conv.scale < 0, -steps, steps)
        self._graph.initializers[conv.weights.name] = self._source.refer(conv.weights)
        values = self._graph.emit("Cast", [conv.weights.name], to=TensorProto.FLOAT)
        if as_matrix:
            shape = [-1, conv.weights.dims[0]]
            turned = self._graph.emit("Transpose", [values], perm=[2, 3, 1, 0])
            values = self._graph.emit("Reshape", [turned, self._graph.constant(shape, np.int64)])
        zeros = self._graph.constant(np.zeros(len(steps)), np.int8)
        weights = self._graph.emit(
            "QuantizeLinear",
            [values, self._graph.constant(steps, np.float32), zeros],
            axis=1 if as_matrix else 0,
        )
        return weights, steps * conv.scale


def _array(tensor: TensorProto) -> NDArray[np.float64]:
    return numpy_helper.to_array(tensor).astype(np.float64)


def _scale_of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The smallest symmetric int8 scale of each output channel: ``(O,)``."""
    greatest = np.abs(weights).max(axis=(1, 2, 3))
    scale: NDArray[np.float64] = np.where(greatest > 0, greatest / 127, 1.0)
    return scale
