"""The int8 graph of every network gives the float network's logits, but for the rounding."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from models.checkpoint import rounded_weights
from models.dataset import read_split
from models.export import export
from models.int8_graph import GraphWriter, QuantizationError
from models.networks import build_network
from models.prediction import INT8_FILE, NETWORK_FILE
from models.quantize import calibrate, quantize
from service.contract import ModelContract
from tests.parity.test_export import contract_of
from tests.voc_data import make_voc


def run(path: Path, image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The logits of a network file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": image})
    result: NDArray[np.float32] = logits
    return result


# Between them: strided, dilated and pooled branches, and a classifier right after the trunk.
@pytest.fixture(scope="module", params=["fcn_resnet50_32s", "context_fcn_resnet50_16s"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights, negative BatchNorm factors among them, and its int8 form."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = build_network(request.param)
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):
            # Untrained residual sums grow with depth, which one scale per tensor cannot hold.
            parameter.data.uniform_(-0.2, 0.2)
    network.load_state_dict(rounded_weights(network))
    contract = contract_of(request.param, network)
    onnx.save(export(network, contract), folder / NETWORK_FILE)
    samples = read_split(make_voc(folder, images=4), "train")
    ranges = calibrate(folder / NETWORK_FILE, contract, samples)
    onnx.save(quantize(folder / NETWORK_FILE, ranges), folder / INT8_FILE)
    return folder


@pytest.mark.parametrize(("height", "width"), [(64, 96), (160, 128)])
def test_the_int8_graph_gives_the_float_graphs_logits(
    artefact: Path, height: int, width: int
) -> None:
    """For several photos at once and sizes that it was not calibrated on; borders included."""
    image = np.asarray(smooth_photos(3, height, width))
    expected, logits = (run(artefact / name, image) for name in (NETWORK_FILE, INT8_FILE))
    assert logits.shape == expected.shape
    error = np.abs(logits - expected)
    spread = expected.std()
    assert error.mean() < 0.1 * spread
    border = np.concatenate([error[:, :, 0], error[:, :, -1]], axis=-1)
    assert border.mean() < 0.2 * spread


def test_photos_of_a_batch_do_not_mix(artefact: Path) -> None:
    """Each gives what it gives alone: neighbours are looked up within one photo."""
    image = smooth_photos(3, 96, 64)
    together = run(artefact / INT8_FILE, image)
    for index in range(3):
        alone = run(artefact / INT8_FILE, image[index : index + 1])
        np.testing.assert_array_equal(together[index], alone[0])


def test_the_int8_file_holds_the_contract_and_no_weights(artefact: Path) -> None:
    """Its weights are the float file's; it says so itself that it computes in int8."""
    model = onnx.load(artefact / INT8_FILE, load_external_data=False)
    contract = ModelContract.from_metadata({p.key: p.value for p in model.metadata_props})
    assert contract.precision == "int8"
    sizes = [(artefact / name).stat().st_size for name in (INT8_FILE, NETWORK_FILE)]
    assert sizes[0] < 0.05 * sizes[1]


def test_the_int8_file_needs_the_float_file(artefact: Path, tmp_path: Path) -> None:
    """Alone it does not load, rather than run on nothing."""
    shutil.copy(artefact / INT8_FILE, tmp_path)
    with pytest.raises(Exception, match=NETWORK_FILE.replace(".", r"\.")):
        run(tmp_path / INT8_FILE, smooth_photos(1, 64, 64))


def test_an_unknown_operator_is_named(tmp_path: Path) -> None:
    """A network that this module was not written for is refused, not guessed at."""
    network = tmp_path / NETWORK_FILE
    network.write_bytes(b"")
    graph = helper.make_graph(
        [helper.make_node("Sigmoid", ["image"], ["logits"])],
        "unknown",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(QuantizationError, match="logits: cannot quantise Sigmoid"):
        GraphWriter(graph, network, {}).write()


def smooth_photos(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """``(count, height, width, 3) uint8``: colours that vary as slowly as a photo's."""
    coarse = np.random.default_rng(7).integers(0, 256, (count, height // 32, width // 32, 3))
    return coarse.repeat(32, axis=1).repeat(32, axis=2).astype(np.uint8)
