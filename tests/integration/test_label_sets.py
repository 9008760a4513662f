"""Models with other label sets than VOC's in every endpoint, the client and `predict`."""

import base64
import io
import json
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools import mask as coco_mask  # type: ignore[import-untyped]

from service.artefact import voc
from service.artefact.labels import VOC_LABELS, LabelSet
from service.cli.coco import CocoFile
from service.cli.main import main
from service.cli.records import PhotoId
from service.client import Client
from service.errors import InvalidParameter
from service.images.brush_rle import RowRuns
from service.inference.upsampling import Labels
from service.jobs.label_config import class_ids, parse_label_config
from service.jobs.label_studio import RegionsWriter
from service.schemas import ModelName, Segmentation
from service.settings import Settings
from service.telemetry import logs
from service.views import Scene
from tests.artefacts import build_artefact, encode, make_contract, paint
from tests.clients import (
    InProcess,
    Server,
    assert_problem,
    drained,
    in_process,
    mask_of,
    serving,
)

pytestmark = pytest.mark.anyio

ROOM = LabelSet(
    names=("background", "chair", "dining table", "Sofa (2 seats)", "Straße"),
    colors=((0, 0, 0), (250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10)),
)
STREET = LabelSet(
    names=("background", *(f"thing {number}" for number in range(1, 150))),
    colors=[tuple(color) for color in voc.FULL_PALETTE[:150].tolist()],
)


CONFIG = (
    '<View><Image name="img" value="$picture"/><BrushLabels name="tag" toName="img">'
    '<Label value="{}"/></BrushLabels></View>'
)


@dataclass(frozen=True)
class Case:
    """A label set, and the two of its classes that are in the photo, most pixels first."""

    labels: LabelSet
    present: tuple[int, int]

    @property
    def mask(self) -> npt.NDArray[np.uint8]:
        """(64, 96) uint8: the first class on the right half, the second on the left."""
        ids = np.zeros((4, 6), dtype=np.uint8)
        ids[:, 3:], ids[2:, :2] = self.present
        return ids.repeat(16, axis=0).repeat(16, axis=1)

    @property
    def photo(self) -> bytes:
        """A PNG file in the classes' colours."""
        return encode(paint(self.mask[::16, ::16], labels=self.labels))

    @property
    def names(self) -> list[str]:
        """The names of the classes that are present."""
        return [self.labels.names[index] for index in self.present]


CASES = (Case(ROOM, (4, 2)), Case(STREET, (149, 130)))


@pytest.fixture(params=CASES, ids=["5 classes", "150 classes"])
def case(request: pytest.FixtureRequest) -> Case:
    """One of the label sets."""
    case: Case = request.param
    return case


@pytest.fixture
def artefact(case: Case, tmp_path: Path) -> Path:
    """An artefact that labels each pixel by the nearest colour, with one for VOC beside it."""
    build_artefact(tmp_path / "models" / "vocs", name="vocs")
    # Stride 1: nothing is interpolated, so that the mask is exact.
    metadata = make_contract(name="own", labels=case.labels, stride=1).to_metadata()
    return build_artefact(
        tmp_path / "models" / "own", name="own", labels=case.labels, metadata=metadata, stride=1
    )


@pytest.fixture
async def client(
    artefact: Path, make_settings: Callable[..., Settings]
) -> AsyncIterator[InProcess]:
    """The app with that artefact."""
    async with in_process(make_settings(model=artefact)) as running:
        yield running


async def segment(client: InProcess, case: Case, accept: str, **query: str) -> httpx.Response:
    """The response to a photo, which must be 200."""
    headers = {"Accept": accept}
    answer = await client.http.post("/segment", content=case.photo, headers=headers, params=query)
    assert answer.status_code == 200, answer.text
    return answer


async def test_the_label_map_is_the_models(client: InProcess, case: Case) -> None:
    """/classes lists the default model's classes, or with `model=` another one's."""
    found = (await client.http.get("/classes")).json()
    assert [one["name"] for one in found["classes"]] == list(case.labels.names)
    assert [tuple(one["color"]) for one in found["classes"]] == list(case.labels.colors)
    other = (await client.http.get("/classes", params={"model": "vocs"})).json()
    assert [one["name"] for one in other["classes"]] == list(voc.CLASSES)
    assert (await client.http.get("/classes", params={"model": "none"})).status_code == 404


async def test_the_mask_carries_the_models_palette(client: InProcess, case: Case) -> None:
    """Pixel values are class ids; the palette has the classes' colours."""
    answer = await segment(client, case, "image/png")
    np.testing.assert_array_equal(mask_of(answer), case.mask)
    with Image.open(io.BytesIO(answer.content)) as image:
        shown = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(shown, case.labels.palette[case.mask])


async def test_every_view_has_the_models_classes(client: InProcess, case: Case) -> None:
    """Overlay, cut-out and confidence use the model's colours and names."""
    overlay = await segment(client, case, "image/png", view="overlay", alpha="1")
    with Image.open(io.BytesIO(overlay.content)) as image:
        inside = case.mask > 0
        np.testing.assert_array_equal(
            np.asarray(image)[inside], case.labels.palette[case.mask][inside]
        )
    for query, kept in (
        ({}, case.mask > 0),
        ({"classes": case.names[1]}, case.mask == case.present[1]),
    ):
        cut = await segment(client, case, "image/png", view="cutout", **query)
        with Image.open(io.BytesIO(cut.content)) as image:
            np.testing.assert_array_equal(np.asarray(image)[..., 3] > 0, kept)
    confidence = await segment(client, case, "image/png", view="confidence", classes=case.names[0])
    with Image.open(io.BytesIO(confidence.content)) as image:
        np.testing.assert_array_equal(np.asarray(image) > 0, case.mask == case.present[0])


@pytest.mark.parametrize("form", ["rle", "polygons", "png", "none"])
async def test_json_names_the_models_classes(client: InProcess, case: Case, form: str) -> None:
    """JSON has ids, names, colours and pixels in each form of the mask."""
    found = (await segment(client, case, "application/json", mask=form)).json()
    by_id = {one["id"]: one for one in found["classes"]}
    assert by_id.keys() == {0, *case.present}
    for index in case.present:
        one, wanted = by_id[index], case.mask == index
        assert one["name"] == case.labels.names[index]
        assert tuple(one["color"]) == case.labels.colors[index]
        assert one["pixels"] == wanted.sum()
        if form == "rle":
            np.testing.assert_array_equal(coco_mask.decode(one["rle"]), wanted)
        if form == "polygons":
            filled = coco_mask.merge(coco_mask.frPyObjects(one["polygons"], *wanted.shape))
            np.testing.assert_array_equal(coco_mask.decode(filled), wanted)
    if form == "png":
        with Image.open(io.BytesIO(base64.b64decode(found["mask"]))) as image:
            np.testing.assert_array_equal(np.asarray(image), case.mask)


async def test_classes_are_chosen_by_the_models_names(client: InProcess, case: Case) -> None:
    """VOC's names are unknown, except with `model=` of VOC's model."""
    only = await segment(client, case, "image/png", classes=case.names[1])
    np.testing.assert_array_equal(
        mask_of(only), np.where(case.mask == case.present[1], case.mask, 0)
    )
    for model, name, status in (
        ("own", "cat", 422),
        ("vocs", "cat", 200),
        ("vocs", case.names[1], 422),
    ):
        answer = await client.http.post(
            "/segment", content=case.photo, params={"classes": name, "model": model}
        )
        assert answer.status_code == status
        if status == 422:
            labels = case.labels if model == "own" else VOC_LABELS
            assert f"there are {', '.join(labels.names)}" in answer.json()["detail"]


async def test_batches(client: InProcess, case: Case) -> None:
    """Archive and JSON lines have the model's classes."""
    files = [("image", ("a.png", case.photo)), ("image", ("b.png", case.photo))]
    archive = await client.http.post("/segment/batch", files=files)
    with zipfile.ZipFile(io.BytesIO(archive.content)) as opened:
        for name in ("a.png", "b.png"):
            with Image.open(io.BytesIO(opened.read(name))) as image:
                np.testing.assert_array_equal(np.asarray(image), case.mask)
    headers = {"Accept": "application/x-ndjson"}
    lines = (await client.http.post("/segment/batch", files=files, headers=headers)).text
    for line in lines.splitlines():
        found = json.loads(line)["segmentation"]["classes"]
        assert {one["name"] for one in found} == {"background", *case.names}


async def test_hugging_face(client: InProcess, case: Case) -> None:
    """Segments have the model's names."""
    answer = await client.http.post("/hf/image-segmentation", content=case.photo)
    segments = {one["label"]: one["mask"] for one in answer.json()}
    assert segments.keys() == {"background", *case.names}
    for index, name in zip(case.present, case.names, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(segments[name]))) as image:
            np.testing.assert_array_equal(np.asarray(image) == 255, case.mask == index)


async def test_label_studio(client: InProcess, case: Case) -> None:
    """A configuration's labels match the model's classes; VOC's match none."""
    picture = "data:image/png;base64," + base64.b64encode(case.photo).decode()
    body = {
        "tasks": [{"data": {"picture": picture}}],
        "label_config": CONFIG.format(case.names[0].upper()),
    }
    (found,) = (await client.http.post("/label-studio/predict", json=body)).json()["results"]
    assert found["model_version"] == "own-1"
    assert [one["value"]["brushlabels"] for one in found["result"]] == [[case.names[0].upper()]]
    refused = await client.http.post(
        "/label-studio/setup", json={"schema": CONFIG.format("aeroplane")}
    )
    assert refused.status_code == 422
    assert case.names[0] in refused.json()["error"]


async def test_open_inference_protocol(client: InProcess, case: Case) -> None:
    """The metadata lists the classes; the mask has their ids."""
    metadata = (await client.http.get("/v2/models/own")).json()
    assert metadata["parameters"] == {"classes": ",".join(case.labels.names)}
    text = base64.b64encode(case.photo).decode()
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [text]}
    body = {"inputs": [tensor], "outputs": [{"name": "mask"}]}
    (mask,) = (await client.http.post("/v2/models/own/infer", json=body)).json()["outputs"]
    np.testing.assert_array_equal(np.reshape(mask["data"], mask["shape"]), case.mask)


async def test_the_catalogue(client: InProcess, case: Case) -> None:
    """/models lists both models, /model describes the default one."""
    listed = (await client.http.get("/models")).json()["models"]
    assert [one["name"] for one in listed] == ["own", "vocs"]
    assert (await client.http.get("/model")).json()["name"] == "own"
    assert (await client.http.get("/readyz")).status_code == 200
    assert 'model="own"' in (await client.http.get("/metrics")).text
    assert len(case.labels) in (5, 150)


@pytest.fixture
def server(artefact: Path) -> Iterator[Server]:
    """A server process with that artefact."""
    with serving(artefact) as running, drained(running):
        yield running


@pytest.fixture
def logging_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """`predict` in this process does not configure logging, which would outlast the test."""
    monkeypatch.setattr(logs, "configure", lambda *_: None)


def check_coco(folder: Path, case: Case) -> None:
    """The categories are all classes except background; the annotations are the photo's."""
    found: dict[str, Any] = json.loads((folder / "annotations.json").read_text())
    names = {one["id"]: one["name"] for one in found["categories"]}
    assert names == dict(list(enumerate(case.labels.names))[1:])
    assert {names[one["category_id"]] for one in found["annotations"]} == set(case.names)


@pytest.mark.usefixtures("logging_as_it_is")
def test_predict(artefact: Path, case: Case, tmp_path: Path) -> None:
    """`predict` writes masks and COCO with the model's classes; a class of VOC is an error."""
    photo = tmp_path / "photo.png"
    photo.write_bytes(case.photo)
    arguments = ["predict", str(photo), "--model", str(artefact), "--out"]
    assert main([*arguments, str(tmp_path / "masks")]) == 0
    with Image.open(tmp_path / "masks" / "photo.png") as image:
        np.testing.assert_array_equal(np.asarray(image), case.mask)
    assert main([*arguments, str(tmp_path / "coco"), "--format", "coco"]) == 0
    check_coco(tmp_path / "coco", case)
    assert main([*arguments, str(tmp_path / "no"), "--classes", "cat"]) == 2


@pytest.mark.usefixtures("logging_as_it_is")
def test_the_client_and_predict_by_a_service(server: Server, case: Case, tmp_path: Path) -> None:
    """The client reads the label map; `predict --url` uses it for COCO's categories."""
    with Client(server.url) as client:
        assert [one.name for one in client.classes().classes] == list(case.labels.names)
        assert [one.name for one in client.classes("vocs").classes] == list(voc.CLASSES)
        np.testing.assert_array_equal(client.mask(case.photo), case.mask)
    photo = tmp_path / "photo.png"
    photo.write_bytes(case.photo)
    arguments = ["predict", str(photo), "--url", server.url, "--format", "coco", "--out"]
    assert main([*arguments, str(tmp_path / "coco")]) == 0
    check_coco(tmp_path / "coco", case)


@pytest.mark.usefixtures("logging_as_it_is")
def test_coco_files_of_other_classes_are_not_resumed(
    artefact: Path, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a whole file nor a partial one: its ids would get the new model's names."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(case.photo)
    out = tmp_path / "out"
    first, both = [str(tmp_path / "a.png")], [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    options = ["--format", "coco", "--out", str(out), "--model"]
    vocs = str(artefact.parent / "vocs")
    assert main(["predict", *first, *options, vocs]) == 0
    assert main(["predict", *both, *options, str(artefact)]) == 2
    assert "comes from other options (model was " in capsys.readouterr().err
    assert main(["predict", *both, *options, vocs]) == 0

    (out / "annotations.json").unlink()
    unfinished = CocoFile({tmp_path / "a.png": "a.png"}, out)
    unfinished.resume({"--format": "coco", "model": "own 1"}, case.labels, None)
    photo_id = PhotoId.of(tmp_path / "a.png", case.photo)
    unfinished.add(tmp_path / "a.png", photo_id, answered(case))
    assert main(["predict", *both, *options, vocs]) == 2
    assert main(["predict", *both, *options, str(artefact), "--overwrite"]) == 0
    check_coco(out, case)
    assert main(["predict", *both, *options, vocs, "--overwrite"]) == 0


def answered(case: Case) -> bytes:
    """The JSON of a photo without any class."""
    answer = Segmentation(
        width=case.mask.shape[1],
        height=case.mask.shape[0],
        model=ModelName(name="own", version="1"),
        classes=[],
        timing_ms={},
    )
    return answer.model_dump_json().encode()


def test_brush_labels_are_those_of_the_answering_model() -> None:
    """A reload may replace the model between a configuration's check and a photo's answer."""
    before = LabelSet(names=("background", "cat", "dog"), colors=ROOM.colors[:3])
    after = LabelSet(names=("background", "dog", "cat"), colors=ROOM.colors[:3])
    (control,) = parse_label_config(CONFIG.format("Cat"), before)
    mask = np.array([[0, 1, 2, 2]], dtype=np.uint8)
    labels = Labels(mask, np.full_like(mask, 255))
    for label_set, pixels in ((before, mask == 1), (after, mask == 2)):
        scene = Scene(labels, make_contract(labels=label_set))
        region = json.loads(bytes(RegionsWriter([control]).write(scene).content))
        assert region["value"]["brushlabels"] == ["Cat"]
        assert region["value"]["rle"] == list(RowRuns.of(pixels.astype(np.uint8)).brush([1]))


def test_a_class_without_letters_is_meant_by_its_very_name() -> None:
    """Names are compared by letters and digits, and such a name has none."""
    odd = LabelSet(names=("background", "???", "-"), colors=ROOM.colors[:3])
    (control,) = parse_label_config(CONFIG.format("???"), odd)
    assert class_ids(control.labels["???"], odd) == {1}
    with pytest.raises(InvalidParameter, match="no label is one of the classes"):
        parse_label_config(CONFIG.format("anything"), odd)


@pytest.mark.parametrize("path", ["/segment", "/segment/batch"])
async def test_a_class_is_checked_before_the_photo(
    client: InProcess, case: Case, path: str
) -> None:
    """By the model that is asked for, in memory or not."""
    answer = await client.http.post(
        path, files=[("image", case.photo)], params={"classes": case.names[0], "model": "vocs"}
    )
    assert_problem(answer, 422, "invalid-parameter")
