"""Sizes, strides, key names and cost of the networks."""

import pytest
import torch
from torch import nn

from models.networks import NETWORKS, build_network
from models.networks.resnet import Normalize

COST = {
    "fcn_resnet50_32s": (23_551_061, 21.364e9),
    "atrous_fcn_resnet50_16s": (23_551_061, 32.470e9),
    "context_fcn_resnet50_16s": (25_481_813, 34.378e9),
}


def multiply_adds(network: nn.Module, side: int) -> int:
    """Multiply-adds of the convolutions for one square image."""
    total = 0

    def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        total += weight.numel() * output.shape[2] * output.shape[3]

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.zeros(1, 3, side, side, device="meta"))
    return total


@pytest.mark.parametrize("name", NETWORKS)
def test_cost_is_what_the_docstring_says(name: str) -> None:
    """Parameter count exactly, multiply-adds at 512x512 within one per mille."""
    parameters, expected = COST[name]
    with torch.device("meta"):
        network = build_network(name)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert multiply_adds(network, 512) == pytest.approx(expected, rel=1e-3)
    doc = NETWORKS[name].__doc__ or ""
    assert f"{parameters:,}" in doc
    assert f"{expected / 1e9:.2f} G" in doc


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_have_the_networks_stride(name: str) -> None:
    """(N, 21, h/stride, w/stride) for any multiple of 32."""
    with torch.device("meta"):
        network = build_network(name).eval()
        logits = network(torch.zeros(2, 3, 96, 160))
    assert logits.shape == (2, 21, 96 // network.stride, 160 // network.stride)


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
        layer4 = build_network("atrous_fcn_resnet50_16s").backbone.layer4
    convs = [m for m in layer4.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert [conv.dilation for conv in convs] == [(1, 1), (2, 2), (2, 2)]
    assert {conv.stride for conv in convs} == {(1, 1)}


def test_normalisation_is_imagenets() -> None:
    """Grey at the mean becomes zero; white is about two standard deviations above."""
    mean = torch.tensor(Normalize.MEAN).view(1, 3, 1, 1)
    out = Normalize()(torch.cat([mean * 255, torch.full((1, 3, 1, 1), 255.0)]))
    torch.testing.assert_close(out[0], torch.zeros(3, 1, 1), atol=1e-6, rtol=0)
    assert out[1].flatten().tolist() == pytest.approx([2.2489, 2.4286, 2.6400], abs=1e-3)


def test_an_unknown_network_is_named() -> None:
    """With the list of those there are."""
    with pytest.raises(ValueError, match=r"'resnet'.*fcn_resnet50_32s"):
        build_network("resnet")
