"""A network's sizes, costs and receptive fields, as table, JSON and picture."""

import json
from functools import cache
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from matplotlib.patches import FancyArrowPatch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.__main__ import main
from models.networks import NETWORKS, build_network
from models.networks.segmentation import Backbone, Features, SegmentationNetwork
from models.stages import describe
from models.structure import SIDE, Stage, structure_of

structure = cache(describe.describe)


def stages(name: str) -> dict[str, Stage]:
    """A network's stages by name."""
    return {stage.name: stage for stage in structure(name).stages}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_totals_are_the_networks(name: str) -> None:
    """Every parameter is in one stage and one layer; multiply-adds equal PyTorch's count."""
    with torch.device("meta"):
        network = build_network(name).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            logits = network(torch.zeros(1, 3, SIDE, SIDE))
    found = structure(name)
    parameters = dict(network.named_parameters())
    assert found.parameters == sum(parameter.numel() for parameter in parameters.values())
    assert found.multiply_adds == counter.get_total_flops() // 2
    assert found.stride == network.stride
    last = found.stages[-1]
    assert (last.channels, last.height, last.width) == logits.shape[1:]
    for stage in found.stages:
        assert stage.parameters == sum(layer.parameters for layer in stage.layers)
        assert stage.multiply_adds == sum(layer.multiply_adds for layer in stage.layers)
    layers = {layer.name for stage in found.stages for layer in stage.layers}
    assert {name.rpartition(".")[0] for name in parameters} <= layers


@pytest.mark.parametrize(
    ("name", "stage", "field"),
    [
        # The often quoted 483 has the stride in a bottleneck's first 1x1 convolution.
        ("fcn_resnet50_32s", "backbone.layer4", 427),
        # A dilated layer reads the same pixels as the strided one.
        ("atrous_fcn_resnet50_16s", "backbone.layer4", 427),
        ("fcn_vgg16_32s", "backbone.features.24..30", 212),
        ("fcn_vgg16_32s", "backbone.classifier.0..5", 404),
        # Bilinear upsampling reads two cells of 32 pixels.
        ("fcn_resnet50_8s", "classifier", 427 + 32),
        ("context_fcn_resnet50_16s", "classifier.far", 427 + 2 * 8 * 16),
        ("context_fcn_resnet50_16s", "classifier.whole", None),
        ("context_fcn_resnet50_16s", "classifier.predict", None),
    ],
)
def test_receptive_fields_are_those_known(name: str, stage: str, field: int | None) -> None:
    """In pixels; None for the whole image."""
    assert stages(name)[stage].receptive_field == field


class Toy(Backbone):
    """Two stages, of strides 2 and 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 2, 5, stride=2, padding=2)
        self.second = nn.Conv2d(2, 2, 3, stride=2, padding=2, dilation=2)
        self.pool = nn.AvgPool2d(2)

    def stages(self) -> list[list[nn.Module]]:
        """See `Backbone`."""
        return [[self.first], [self.second, self.pool]]


class ToyHead(nn.Module):
    """Upsamples from stride 8 to 2, by interpolation or by a transposed convolution."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 2, 8, stride=4, padding=2) if transposed else None
        self.predict = nn.Conv2d(4, 21, 1)

    def forward(self, features: Features) -> torch.Tensor:
        """See the class."""
        _, fine, x = features
        x = F.interpolate(x, scale_factor=4, mode="bilinear") if self.up is None else self.up(x)
        out: torch.Tensor = self.predict(torch.cat((fine, x), dim=1))
        return out


def toy(*, transposed: bool) -> SegmentationNetwork:
    """Two channels and positive weights, so that no two paths of a pixel cancel out."""
    head = ToyHead(transposed=transposed)
    network = SegmentationNetwork(stride=2, backbone=Toy(), classifier=head).double()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.5, 1)
    return network


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_receptive_fields_are_what_gradients_reach(transposed: bool) -> None:
    """For strides, dilation, pooling, interpolation and transposed convolution."""
    torch.manual_seed(0)
    network = toy(transposed=transposed)
    with torch.device("meta"):
        found = structure_of(toy(transposed=transposed).float())
    image = torch.rand(1, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    *features, logits = (*network.leading(image, 2), network(image))
    reached = []
    for output in (*features[1:], logits):
        cells = range(output.shape[2] // 2, output.shape[2] // 2 + 32 * output.shape[2] // SIDE)
        spans = []
        for cell in cells:
            (gradient,) = torch.autograd.grad(output[0, :, cell, 0].sum(), image, retain_graph=True)
            rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero()
            spans.append(int(rows.max() - rows.min()) + 1)
        reached.append(max(spans))
    by_name = {stage.name: stage.receptive_field for stage in found.stages}
    names = ("backbone.first", "backbone.second..pool", "classifier.predict")
    assert [by_name[name] for name in names] == reached
    assert found.receptive_field == reached[-1]


def test_a_stage_names_what_it_reads() -> None:
    """Including skips: an encoder's stage and the previous stage."""
    context = stages("context_fcn_resnet50_8s")
    assert context["classifier.edge"].inputs == ("backbone.layer2",)
    assert context["classifier.join"].inputs == (
        "classifier.fuse",
        "classifier.whole",
        "classifier.edge",
    )
    assert stages("densenet_fcn")["classifier.blocks.4"].inputs == (
        "backbone.features.conv0..denseblock1",
        "classifier.blocks.3",
    )
    assert stages("fcn_resnet50_32s")["backbone.conv1..maxpool"].inputs == ("image",)


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_read_only_what_comes_before(name: str) -> None:
    """And every stage but the last is read by another."""
    before = ["image"]
    for stage in structure(name).stages:
        assert stage.inputs
        assert set(stage.inputs) <= set(before)
        before.append(stage.name)
    read = {source for stage in structure(name).stages for source in stage.inputs}
    assert read == set(before[:-1])


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line reuses structures that are already traced."""
    monkeypatch.setattr(describe, "describe", structure)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The totals, and a line for each stage."""
    assert main(["describe", "fcn_resnet50_8s"]) == 0
    printed = capsys.readouterr().out
    assert "fcn_resnet50_8s: 23,583,359 parameters, 21.430 G multiply-adds at 512x512" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("backbone.layer4")]
    shown = "backbone.layer4 2048 x 16 x 16 32 427 px 14,964,736 4.228 G backbone.layer3"
    assert " ".join(line.split()) == shown


def test_the_tree_goes_down_to_the_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON, printed or written; layers are called after the network's modules."""
    command = ["describe", "context_fcn_resnet50_16s", "--format", "json"]
    assert main(command) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["name"], tree["image"]) == ("context_fcn_resnet50_16s", [3, 512, 512])
    assert (tree["stride"], tree["receptive_field"]) == (16, None)
    assert tree["parameters"] == sum(stage["parameters"] for stage in tree["stages"])
    (near,) = [stage for stage in tree["stages"] if stage["name"] == "classifier.near"]
    assert near["inputs"] == ["classifier.reduce"]
    conv = near["layers"][0]
    assert (conv["name"], conv["kind"]) == ("classifier.near.0", "Conv2d")
    assert "dilation=(4, 4)" in conv["settings"]
    assert main([*command, "--out", str(tmp_path / "tree.json")]) == 0
    assert json.loads((tmp_path / "tree.json").read_text(encoding="utf-8")) == tree


def test_the_picture_is_svg_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Well-formed, named after the network, and reproducible."""
    monkeypatch.chdir(tmp_path)
    command = ["describe", "densenet_fcn", "--format", "svg"]
    assert main(command) == 0
    assert main([*command, "--out", "again.svg"]) == 0
    drawn = Path("densenet_fcn.svg").read_bytes()
    assert drawn == Path("again.svg").read_bytes()
    texts = [element.text for element in ElementTree.fromstring(drawn).iter() if element.text]  # noqa: S314  (our own file)
    shown = [text.strip() for text in texts]
    for stage in structure("densenet_fcn").stages:
        assert stage.name.partition(".")[2] in shown
        assert f"{stage.parameters:,}" in shown


def test_the_picture_is_png(tmp_path: Path) -> None:
    """Large enough to read on a page."""
    path = tmp_path / "network.png"
    assert main(["describe", "fcn_vgg16_32s", "--format", "png", "--out", str(path)]) == 0
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= 1000


@pytest.mark.parametrize("name", NETWORKS)
def test_the_picture_is_legible(name: str) -> None:
    """No text overlaps another or leaves the page; every input has an arrow."""
    figure = describe.draw(name, structure(name))
    arrows = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) == sum(len(stage.inputs) for stage in structure(name).stages)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    for one, other in combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_an_unknown_network_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """As a wrong argument; the message lists the names."""
    with pytest.raises(SystemExit) as stopped:
        main(["describe", "resnet"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "'resnet'" in message
    assert "context_fcn_resnet50_16s" in message
