"""The offline stages from checkpoint to served artefact, for other label sets than VOC's."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import httpx
import pytest
import torch
from torch import nn

from models.__main__ import main
from models.checkpoint import rounded_weights, save_checkpoint
from models.dataset import read_split
from models.graphs.network_file import NETWORK_FILES
from models.networks import NETWORKS, SegmentationNetwork, build_network
from models.networks.segmentation import Backbone, LinearHead, Normalize
from models.prediction import onnx_infer
from models.recipe import find_recipe, load_recipe
from models.stages import evaluate
from service.artefact import voc
from service.artefact.labels import LabelSet
from service.artefact.manifest import load_manifest
from service.inference.session import load_model
from tests.clients import serving
from tests.voc_data import make_voc

NETWORK = "nearest_color"

# The background of the data is about that grey.
GREY, RED, GREEN = (30, 30, 30), (250, 10, 10), (10, 250, 10)
BLUE, YELLOW = (10, 10, 250), (250, 250, 10)
ROOM = LabelSet(
    names=("background", "chair", "dining table", "Sofa (2 seats)", "Straße"),
    colors=(GREY, RED, GREEN, BLUE, YELLOW),
    ignore_index=99,
)
# The classes in the photos are far from the others, which have 150 nearly white colours.
WHITES = list(product(range(200, 251, 10), range(200, 241, 10), range(200, 241, 10)))
STREET = LabelSet(
    names=("background", *(f"thing {number}" for number in range(1, 150))),
    colors=(GREY, *WHITES[1:7], RED, *WHITES[8:130], GREEN, *WHITES[131:149], BLUE),
    ignore_index=200,
)


class Colors(Backbone):
    """The colour at the middle of each cell of 16 pixels, as six channels that are not negative."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 6, 3, stride=8, dilation=4, padding=4, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        signed = torch.cat((torch.eye(3), -torch.eye(3)))
        self.conv1.weight.data.zero_()[:, :, 2:5, 2:5] = signed[:, :, None, None] / 9
        self.conv2.weight.data.zero_()[:, :, 2, 2] = torch.eye(6)

    def stages(self) -> Sequence[Sequence[nn.Module]]:
        """See `Backbone`."""
        return [[self.conv1, self.bn1, self.relu, self.conv2, self.bn2, self.relu]]


def nearest_color(classes: int) -> SegmentationNetwork:
    """A network that `save_run` gives the classes' colours."""
    return SegmentationNetwork(stride=16, backbone=Colors(), classifier=LinearHead(6, classes))


def save_run(labels: LabelSet, path: Path) -> None:
    """Write a checkpoint whose network labels each cell with its nearest class colour.

    The logits are minus the squared distance, without the term that all classes have.
    """
    network = build_network(NETWORK, len(labels))
    colors = torch.tensor(labels.colors) / 255
    colors = ((colors - torch.tensor(Normalize.MEAN)) / torch.tensor(Normalize.STD)).half().float()
    weight = 2 * torch.cat((colors, -colors), dim=1)
    network.get_parameter("classifier.predict.weight").data = weight[:, :, None, None]
    network.get_parameter("classifier.predict.bias").data = -(colors**2).sum(dim=1)
    changes = (f'network = "{NETWORK}"', "working_size = 256")
    recipe = load_recipe(find_recipe("cpu"), changes)
    state = {
        "recipe": recipe.model_dump(mode="json"),
        "labels": labels.model_dump(mode="json"),
        "model": rounded_weights(network),
    }
    save_checkpoint(path, state)


@dataclass(frozen=True)
class Run:
    """A label set, the folder of its run, and its data."""

    labels: LabelSet
    folder: Path
    data: Path

    @property
    def checkpoint(self) -> Path:
        """The run's checkpoint."""
        return self.folder / "checkpoint.pt"

    @property
    def artefact(self) -> Path:
        """The artefact folder."""
        return self.folder / "own_labels"

    def stage(self, name: str, **options: object) -> int:
        """Run a stage as ``python -m models`` does; returns its exit status."""
        arguments = [name]
        for key, value in options.items():
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{key.replace('_', '-')}", *map(str, values)]
        return main(arguments)


CASES = ((ROOM, (4, 2, 1)), (STREET, (149, 130, 7)))


@pytest.fixture(params=CASES, ids=["5 classes", "150 classes"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A checkpoint, and photos with three of its classes; void is the label set's."""
    labels, class_ids = request.param
    monkeypatch.setitem(NETWORKS, NETWORK, nearest_color)
    # Drawing is most of an evaluation of so few photos.
    monkeypatch.setattr(evaluate, "SHEET_ROWS", 1)
    data = make_voc(tmp_path, images=4, size=(96, 128), labels=labels, class_ids=class_ids)
    made = Run(labels, tmp_path, data)
    save_run(labels, made.checkpoint)
    return made


def test_a_label_set_goes_from_the_checkpoint_to_the_service(run: Run) -> None:
    """Every stage keeps it, every precision passes its gates, and the service names its classes."""
    folder, artefact, data = run.folder, run.artefact, run.data
    assert run.stage("export", checkpoint=run.checkpoint, artifact=artefact, version="1") == 0
    assert run.stage("half", artifact=artefact) == 0
    assert run.stage("quantize", artifact=artefact, data=data, images=3) == 0
    reports = []
    for precision, name in NETWORK_FILES.items():
        assert onnx_infer(artefact / name)[1].labels == run.labels
        out = folder / precision
        assert (
            run.stage("evaluate", artifact=artefact, data=data, precision=precision, out=out) == 0
        )
        reports.append(out / "evaluation.json")
    parity = folder / "parity.json"
    verified = {"checkpoint": run.checkpoint, "artifact": artefact}
    assert run.stage("verify", **verified, data=data, out=parity) == 0
    licences = {"weights_licence": "none: made up", "data_licence": "none: made up"}
    assert run.stage("manifest", **verified, evaluation=reports, parity=parity, **licences) == 0

    accuracy = load_manifest(artefact).metrics["int8"]
    assert tuple(accuracy.per_class_iou) == run.labels.names
    assert accuracy.miou > 0.9
    assert load_model(artefact, "cpu", threads=1).contract.labels == run.labels

    sample = read_split(data, "val", run.labels)[0]
    with serving(artefact, precision="fp32") as server:
        photo, headers = sample.image_path.read_bytes(), {"Accept": "application/json"}
        found = httpx.post(f"{server.url}/segment", content=photo, headers=headers).json()
        out = folder / "url"
        assert run.stage("evaluate", url=server.url, data=data, out=out) == 0
    pixels = Counter(sample.load()[1].tobytes())
    del pixels[voc.IGNORE_INDEX]
    names = [run.labels.names[class_id] for class_id, _ in pixels.most_common()]
    assert [one["name"] for one in found["classes"]] == names
    served, exported = (json.loads(p.read_text()) for p in (out / "evaluation.json", reports[0]))
    assert served["metrics"]["per_class_iou"].keys() == exported["metrics"]["per_class_iou"].keys()
    assert served["metrics"]["miou"] == pytest.approx(exported["metrics"]["miou"], abs=5e-4)
