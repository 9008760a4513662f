"""Every network's exported graph gives the logits that torch gives."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from torch import nn

from models.checkpoint import rounded_weights
from models.networks import NETWORKS, SegmentationNetwork, build_network
from models.networks.segmentation import Normalize
from models.prediction import SHAPES
from models.stages.export import ExportError, export
from service.artefact.contract import ModelContract


def contract_of(name: str, network: SegmentationNetwork) -> ModelContract:
    """The contract of the network."""
    return ModelContract(
        name=name,
        version="1",
        network=name,
        stride=network.stride,
        mean=Normalize.MEAN,
        std=Normalize.STD,
        working_size=512,
        shapes=SHAPES,
        precision="fp32",
    )


@pytest.fixture(
    params=[
        # DenseNet has hundreds of concatenations, VGG 134 million weights: both take long.
        pytest.param(name, marks=pytest.mark.long if "densenet" in name or "vgg" in name else ())
        for name in NETWORKS
    ]
)
def trained(request: pytest.FixtureRequest) -> tuple[str, SegmentationNetwork]:
    """A network with random BatchNorm statistics and its weights on fp16's grid."""
    torch.manual_seed(0)
    network = build_network(request.param)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            state = module.state_dict()
            state["running_mean"].normal_(0, 0.1)
            state["running_var"].uniform_(0.5, 2)
            state["weight"].uniform_(0.2, 0.6)
            state["bias"].normal_(0, 0.1)
    network.load_state_dict(rounded_weights(network))
    return request.param, network.eval()


def test_the_graph_gives_torchs_logits(
    tmp_path: Path, trained: tuple[str, SegmentationNetwork]
) -> None:
    """For another batch and size than in tracing; folding BatchNorm changes nothing."""
    name, network = trained
    image = np.random.default_rng(0).integers(0, 256, (3, 96, 128, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = network(torch.from_numpy(image).permute(0, 3, 1, 2).float()).numpy()
    onnx.save(export(network, contract_of(name, network)), tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(
        tmp_path / "network.onnx", providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(["logits"], {"image": image})
    assert expected.std() > 1e-3
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


def test_weights_off_the_fp16_grid_are_refused() -> None:
    """Rounding them would change the network."""
    network = build_network("fcn_resnet50_32s")
    with pytest.raises(ExportError, match="fp16"):
        export(network, contract_of("fcn_resnet50_32s", network))
