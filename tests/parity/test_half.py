"""The fp16 graph gives the float network's logits up to rounding."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from models.graphs.fp16 import halve, with_rounding
from models.graphs.network_file import NETWORK_FILES, GraphError
from models.prediction import onnx_infer
from service.artefact.contract import ModelContract
from tests.parity.test_quantize import save_sigmoid, smooth_photos

# All have CUDA kernels in ONNX Runtime, and none of these reads a tensor on the CPU.
ALLOWED = {
    *("Conv", "Relu", "MaxPool", "Add", "Concat", "ReduceMean", "Resize"),
    *("Cast", "Transpose", "Sub", "Div", "Mul"),
}


def test_the_fp16_graph_gives_the_float_graphs_logits(artefact: Path) -> None:
    """As float32, with every activation rounded to fp16 as on a GPU."""
    exact, rounded = (onnx_infer(artefact / NETWORK_FILES[p])[0] for p in ("fp32", "fp16"))
    for height, width in ((64, 96), (160, 128)):
        image = smooth_photos(3, height, width)
        expected, logits = exact(image).numpy(), rounded(image).numpy()
        assert logits.dtype == np.float32
        assert 0 < np.abs(logits - expected).max() < 0.02 * expected.std()


def test_the_cpu_rounds_what_a_gpu_rounds() -> None:
    """2048 + 1 is 2048 in fp16, which has 11 bits; the CPU must not be more exact."""
    one, back = (
        numpy_helper.from_array(np.array([value], np.float16), name)
        for name, value in (("one", 1), ("back", -2048))
    )
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Add", ["half", "one"], ["sum"]),
            helper.make_node("Add", ["sum", "back"], ["difference"]),
            helper.make_node("Cast", ["difference"], ["y"], to=TensorProto.FLOAT),
        ],
        "rounding",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [one, back],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(
        with_rounding(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert session.run(["y"], {"x": np.array([2048], np.float32)})[0] == 0


def test_weights_are_rounded_once(artefact: Path) -> None:
    """fp16 weights are multiplied by BatchNorm's factor in fp32, then rounded to fp16."""
    exact, rounded = (weights_of(artefact / NETWORK_FILES[p]) for p in ("fp32", "fp16"))
    assert len(exact) == len(rounded) > 50
    for expected, got in zip(exact[:-1], rounded[:-1], strict=True):
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, expected.astype(np.float16))
    np.testing.assert_array_equal(rounded[-1], exact[-1])  # the logits' convolution


def weights_of(path: Path) -> list[NDArray[np.generic]]:
    """The convolutions' weights after loading, in the graph's order."""
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    names = [node.input[1] for node in model.graph.node if node.op_type == "Conv"]
    computed = [name for name in names if name not in constants]
    types = {v.name: v for v in shape_inference.infer_shapes(model).graph.value_info}
    model.graph.output.extend(types[name] for name in computed)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    values = session.run(computed, {"image": np.zeros((1, 64, 64, 3), np.uint8)})
    constants.update(zip(computed, values, strict=True))
    return [constants[name] for name in names]


def test_every_large_operator_computes_in_fp16(artefact: Path) -> None:
    """Every operator has a CUDA kernel; all convolutions but the last compute in fp16."""
    model = onnx.load(artefact / NETWORK_FILES["fp16"])
    assert {node.op_type for node in model.graph.node} <= ALLOWED
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    }
    for node in model.graph.node:
        if (
            node.op_type in {"Conv", "Relu", "Add", "MaxPool", "Concat", "Resize"}
            and "logits" not in node.output
        ):
            assert types[node.output[0]] == TensorProto.FLOAT16


def test_the_fp16_file_holds_the_contract_and_no_weights(artefact: Path) -> None:
    """Its weights are in the float file; its contract says fp16."""
    path = artefact / NETWORK_FILES["fp16"]
    model = onnx.load(path, load_external_data=False)
    contract = ModelContract.from_metadata({p.key: p.value for p in model.metadata_props})
    assert contract.precision == "fp16"
    resized_by = {node.input[2] for node in model.graph.node if node.op_type == "Resize"}
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64 or tensor.name in resized_by:
            continue
        assert tensor.data_location == TensorProto.EXTERNAL
        assert {e.key: e.value for e in tensor.external_data}["location"] == NETWORK_FILES["fp32"]
    assert path.stat().st_size < 0.5e6


def test_the_fp16_file_needs_the_float_file(artefact: Path, tmp_path: Path) -> None:
    """Without the float file, loading fails."""
    shutil.copy(artefact / NETWORK_FILES["fp16"], tmp_path)
    with pytest.raises(Exception, match=NETWORK_FILES["fp32"].replace(".", r"\.")):
        onnx_infer(tmp_path / NETWORK_FILES["fp16"])


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    """An unsupported network is refused."""
    with pytest.raises(GraphError, match="logits: cannot compute Sigmoid in fp16"):
        halve(save_sigmoid(tmp_path))
