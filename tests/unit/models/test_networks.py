"""Sizes, strides, key names and cost of the networks."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from models.checkpoint import Trained
from models.networks import NETWORKS, build_network
from models.networks.densenet import DenseBlock, DenseNet121
from models.networks.segmentation import Backbone, LinearHead, Normalize, SegmentationNetwork
from models.networks.vgg16 import VGG16
from models.recipe import load_recipe
from models.stages.export import ExportError, export, make_contract
from service.artefact.contract import ModelContract
from service.artefact.labels import MAX_CLASSES, VOC_LABELS

COST = {
    "fcn_resnet50_32s": (23_551_061, 21.364e9),
    "fcn_resnet50_16s": (23_572_586, 21.386e9),
    "fcn_resnet50_8s": (23_583_359, 21.430e9),
    "atrous_fcn_resnet50_16s": (23_551_061, 32.470e9),
    "context_fcn_resnet50_16s": (25_481_813, 34.378e9),
    "context_fcn_resnet50_8s": (25_854_261, 35.919e9),
    "fcn_vgg16_32s": (134_346_581, 110.802e9),
    "atrous_fcn_vgg16_16s": (134_346_581, 202.673e9),
    "densenet_fcn": (9_321_429, 105.540e9),
    "atrous_densenet": (6_975_381, 113.376e9),
}


def multiply_adds(network: nn.Module, side: int) -> int:
    """Multiply-adds of the convolutions for one square image."""
    counter = FlopCounterMode(display=False)
    with counter:
        network(torch.zeros(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", NETWORKS)
def test_cost_is_what_the_docstring_says(name: str) -> None:
    """Parameter count exactly, multiply-adds at 512x512 within one per mille."""
    parameters, expected = COST[name]
    with torch.device("meta"):
        network = build_network(name).eval()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert multiply_adds(network, 512) == pytest.approx(expected, rel=1e-3)
    doc = NETWORKS[name].__doc__ or ""
    assert f"{parameters:,}" in doc
    assert f"{expected / 1e9:.2f} G" in doc


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_networks_stride(name: str) -> None:
    """(N, 21, h/stride, w/stride) for any multiple of 32; the contract allows the stride."""
    with torch.device("meta"):
        network = build_network(name).eval()
        logits = network(torch.zeros(2, 3, 96, 160))
    assert logits.shape == (2, 21, 96 // network.stride, 160 // network.stride)
    assert network.stride in get_args(ModelContract.model_fields["stride"].annotation)


def test_backbone_keys_are_torchvisions() -> None:
    """So that any torchvision-layout ResNet-50 loads."""
    with torch.device("meta"):
        keys = set(build_network("atrous_fcn_resnet50_16s").backbone.state_dict())
    assert len(keys) == 318
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.downsample.0.weight",
        "layer1.0.downsample.1.num_batches_tracked",
        "layer3.5.conv3.weight",
        "layer4.2.bn3.bias",
    } <= keys


def test_dilation_replaces_the_last_stride() -> None:
    """As torchvision's replace_stride_with_dilation: first block 1, the others 2."""
    with torch.device("meta"):
        layer4 = build_network("atrous_fcn_resnet50_16s").backbone.get_submodule("layer4")
    convs = [m for m in layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [conv.dilation for conv in convs] == [(1, 1), (2, 2), (2, 2)]
    assert {conv.stride for conv in convs} == {(1, 1)}


def test_vggs_keys_are_torchvisions() -> None:
    """Dilated or not; the fully connected layers are convolutions under the same names."""
    with torch.device("meta"):
        weights, dilated = VGG16(dilate=False).state_dict(), VGG16(dilate=True).state_dict()
    assert dilated.keys() == weights.keys()
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    layers = [*(f"features.{index}" for index in convolutions), "classifier.0", "classifier.3"]
    assert [key for key in weights if key.endswith("weight")] == [f"{n}.weight" for n in layers]
    assert weights["features.28.weight"].shape == (512, 512, 3, 3)
    assert weights["classifier.0.weight"].shape == (4096, 512, 7, 7)
    assert weights["classifier.3.weight"].shape == (4096, 4096, 1, 1)


def test_vggs_dilation_replaces_the_last_pooling() -> None:
    """Its 7x7 layer reads every second cell of a map with twice the resolution."""
    for dilate, poolings, dilation in ((False, 5, 1), (True, 4, 2)):
        with torch.device("meta"):
            vgg = VGG16(dilate=dilate)
        assert sum(isinstance(module, nn.MaxPool2d) for module in vgg.modules()) == poolings
        assert vgg.get_submodule("classifier.0").dilation == (dilation, dilation)


def test_densenets_keys_are_torchvisions() -> None:
    """So that any torchvision-layout DenseNet-121 loads."""
    with torch.device("meta"):
        keys = set(DenseNet121().state_dict())
    assert len(keys) == 725
    assert {
        "features.conv0.weight",
        "features.norm0.running_var",
        "features.denseblock1.denselayer1.norm1.weight",
        "features.denseblock3.denselayer24.conv2.weight",
        "features.transition2.conv.weight",
        "features.denseblock4.denselayer16.norm2.num_batches_tracked",
        "features.norm5.bias",
    } <= keys


def test_densenets_blocks_dilate_where_they_would_shrink() -> None:
    """By 1, 2, 4 and 8 cells, instead of strides 4 to 32."""
    with torch.device("meta"):
        features = DenseNet121().features
    for index, dilation in enumerate((1, 2, 4, 8), start=1):
        block = features.get_submodule(f"denseblock{index}")
        assert {
            module.dilation
            for module in block.modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
        } == {(dilation, dilation)}


def test_a_dense_layer_reads_all_layers_before_it() -> None:
    """A block returns its input, where it keeps it, then each layer's output, in order."""
    torch.manual_seed(0)
    kept, dropped = DenseBlock(6, 3, 4).eval(), DenseBlock(6, 3, 4, keep_input=False).eval()
    dropped.load_state_dict(kept.state_dict())
    x = torch.randn(1, 6, 8, 8)
    out = kept(x)
    assert out.shape[1] == kept.out_channels == 6 + 3 * 4
    assert torch.equal(out[:, :6], x)
    assert torch.equal(out[:, 14:], kept.get_submodule("denselayer3")(out[:, :14]))
    assert torch.equal(dropped(x), out[:, 6:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50_8s", "densenet_fcn", "atrous_densenet"])
def test_the_leading_stages_can_be_computed_before(name: str) -> None:
    """And give the whole network's logits."""
    torch.manual_seed(0)
    network = build_network(name).eval()
    image = torch.rand(1, 3, 32, 64) * 255
    with torch.inference_mode():
        whole = network(image)
        for stages in range(3):
            features = network.leading(image, stages)
            assert len(features) == 1 + stages
            assert torch.equal(network(image, features), whole)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("fcn_vgg16_32s", 1e-3),
        ("atrous_fcn_vgg16_16s", 1e-3),
        ("densenet_fcn", 1e-2),
        ("atrous_densenet", 1e-2),
    ],
)
def test_a_training_step_lowers_the_loss(name: str, rate: float) -> None:
    """On the same batch, with the same dropout."""
    torch.manual_seed(0)
    network = build_network(name)
    image = torch.rand(2, 3, 64, 64) * 255
    target = torch.zeros(2, 64, 64, dtype=torch.long)
    target[:, 16:48, 16:48] = 15

    def loss() -> torch.Tensor:
        torch.manual_seed(1)
        logits = F.interpolate(network(image), (64, 64), mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, target)

    before = loss()
    before.backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(network.parameters(), lr=rate).step()
    assert loss() < 0.95 * before


class Misordered(Backbone):
    """A convolution whose BatchNorm is registered before it."""

    def __init__(self) -> None:
        super().__init__()
        # Large enough that the exporter does not fold it by itself.
        self.norm = nn.BatchNorm2d(64)
        self.conv = nn.Conv2d(3, 64, 8, stride=8)

    def stages(self) -> list[list[nn.Module]]:
        """See `Backbone`."""
        return [[self.conv, self.norm, nn.ReLU()]]


@pytest.mark.slow
def test_a_batch_norm_that_was_not_folded_is_refused() -> None:
    """It would cost time in every run of the graph."""
    network = SegmentationNetwork(stride=8, backbone=Misordered(), classifier=LinearHead(64, 21))
    for parameter in network.parameters():
        parameter.data = parameter.half().float()
    recipe = load_recipe(Path(models.__file__).parent / "recipes" / "cpu.toml")
    contract = make_contract("misordered", "1", Trained(network, recipe, VOC_LABELS))
    with pytest.raises(ExportError, match="BatchNorm was not folded"):
        export(network, contract)


def test_normalisation_is_imagenets() -> None:
    """Grey at the mean becomes zero; white is about two standard deviations above."""
    mean = torch.tensor(Normalize.MEAN).view(1, 3, 1, 1)
    out = Normalize()(torch.cat([mean * 255, torch.full((1, 3, 1, 1), 255.0)]))
    torch.testing.assert_close(out[0], torch.zeros(3, 1, 1), atol=1e-6, rtol=0)
    assert out[1].flatten().tolist() == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_label_sets_classes(name: str) -> None:
    """Any number of classes, from one to the most that a label set has."""
    for classes in (1, MAX_CLASSES):
        with torch.device("meta"):
            network = build_network(name, classes).eval()
        assert network(torch.zeros(1, 3, 32, 32, device="meta")).shape[1] == classes


def test_an_unknown_network_is_named() -> None:
    """The message lists the known ones."""
    with pytest.raises(ValueError, match=r"'resnet'.*fcn_resnet50_32s"):
        build_network("resnet")
