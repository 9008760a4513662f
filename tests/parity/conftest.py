"""Networks of random weights in every precision, made once for all tests here."""

from pathlib import Path

import onnx
import pytest
import torch

from models.checkpoint import rounded_weights
from models.dataset import read_split
from models.graphs.fp16 import halve
from models.graphs.network_file import FILES
from models.networks import build_network
from models.stages.export import export
from models.stages.quantize import calibrate, quantize
from tests.parity.test_export import contract_of
from tests.voc_data import make_voc


# Between them: strided, dilated and pooled branches, and predictions summed right after the
# trunk.
@pytest.fixture(scope="session", params=["fcn_resnet50_8s", "context_fcn_resnet50_8s"])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, negative BatchNorm factors among its weights, and its int8 and fp16 forms."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    network = build_network(request.param)
    for name, parameter in network.named_parameters():
        if name.endswith("bn3.weight"):
            # Untrained residual sums grow with depth, which one scale per tensor cannot hold.
            parameter.data.uniform_(-0.2, 0.2)
    network.load_state_dict(rounded_weights(network))
    contract = contract_of(request.param, network)
    path = folder / FILES["fp32"]
    onnx.save(export(network, contract), path)
    samples = read_split(make_voc(folder, images=4), "train")
    onnx.save(quantize(path, calibrate(path, contract, samples)), folder / FILES["int8"])
    onnx.save(halve(path), folder / FILES["fp16"])
    return folder
