"""The int8 graph gives the float network's logits up to rounding."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from models.graphs.network_file import NETWORK_FILES, GraphError
from models.stages.quantize import quantize
from service.artefact.contract import ModelContract
from tests.artefacts import make_contract


def run(path: Path, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The logits of a network file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": image})
    result: NDArray[np.float32] = logits
    return result


@pytest.mark.parametrize(("height", "width"), [(64, 96), (160, 128)])
def test_the_int8_graph_gives_the_float_graphs_logits(
    artefact: Path, height: int, width: int
) -> None:
    """For batches and for sizes that it was not calibrated on; borders included."""
    image = np.asarray(smooth_photos(3, height, width))
    expected, logits = (
        run(artefact / name, image) for name in (NETWORK_FILES["fp32"], NETWORK_FILES["int8"])
    )
    assert logits.shape == expected.shape
    error = np.abs(logits - expected)
    spread = expected.std()
    assert error.mean() < 0.1 * spread
    border = np.concatenate([error[:, :, 0], error[:, :, -1]], axis=-1)
    assert border.mean() < 0.2 * spread


def test_photos_of_a_batch_do_not_mix(artefact: Path) -> None:
    """A photo gives the same logits alone: its neighbours are within the photo."""
    image = smooth_photos(3, 96, 64)
    together = run(artefact / NETWORK_FILES["int8"], image)
    for index in range(3):
        alone = run(artefact / NETWORK_FILES["int8"], image[index : index + 1])
        np.testing.assert_array_equal(together[index], alone[0])


def test_the_int8_file_holds_the_contract_and_no_weights(artefact: Path) -> None:
    """Its weights are in the float file; its contract says int8."""
    model = onnx.load(artefact / NETWORK_FILES["int8"], load_external_data=False)
    contract = ModelContract.from_metadata({p.key: p.value for p in model.metadata_props})
    assert contract.precision == "int8"
    sizes = [
        (artefact / name).stat().st_size for name in (NETWORK_FILES["int8"], NETWORK_FILES["fp32"])
    ]
    assert sizes[0] < 0.05 * sizes[1]


def test_the_int8_file_needs_the_float_file(artefact: Path, tmp_path: Path) -> None:
    """Without the float file, loading fails."""
    shutil.copy(artefact / NETWORK_FILES["int8"], tmp_path)
    with pytest.raises(Exception, match=NETWORK_FILES["fp32"].replace(".", r"\.")):
        run(tmp_path / NETWORK_FILES["int8"], smooth_photos(1, 64, 64))


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    """An unsupported network is refused."""
    with pytest.raises(GraphError, match="logits: cannot quantise Sigmoid"):
        quantize(save_sigmoid(tmp_path), {})


def save_sigmoid(folder: Path) -> Path:
    """A network with a contract and an operator that no supported network has."""
    graph = helper.make_graph(
        [helper.make_node("Sigmoid", ["image"], ["logits"])],
        "unknown",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph)
    helper.set_model_props(model, make_contract().to_metadata())
    path = folder / NETWORK_FILES["fp32"]
    onnx.save(model, path)
    return path


def smooth_photos(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """``(count, height, width, 3) uint8``: colours that vary as slowly as a photo's."""
    coarse = np.random.default_rng(7).integers(0, 256, (count, height // 32, width // 32, 3))
    return coarse.repeat(32, axis=1).repeat(32, axis=2).astype(np.uint8)
