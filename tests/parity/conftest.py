"""Networks with random weights in every precision, shared by all tests here."""

from pathlib import Path

import onnx
import pytest
import torch

from models.checkpoint import rounded_weights
from models.dataset import read_split
from models.graphs.fp16 import halve
from models.graphs.network_file import NETWORK_FILES
from models.networks import build_network
from models.stages.export import export
from models.stages.quantize import calibrate, quantize
from tests.parity.test_export import contract_of
from tests.voc_data import make_voc


# Together they have strided, dilated and pooled branches, and predictions summed right after the
# backbone.
@pytest.fixture(scope="session", params=["fcn_resnet50_8s", "context_fcn_resnet50_8s"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with some negative BatchNorm factors, in fp32, fp16 and int8."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = build_network(request.param)
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):
            # Untrained residual sums grow with depth, too much for one scale per tensor.
            parameter.data.uniform_(-0.2, 0.2)
    network.load_state_dict(rounded_weights(network))
    contract = contract_of(request.param, network)
    path = folder / NETWORK_FILES["fp32"]
    onnx.save(export(network, contract), path)
    samples = read_split(make_voc(folder, images=4), "train")
    onnx.save(quantize(path, calibrate(path, contract, samples)), folder / NETWORK_FILES["int8"])
    onnx.save(halve(path), folder / NETWORK_FILES["fp16"])
    return folder
