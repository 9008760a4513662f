"""The evaluation's report for given confusion matrices."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.__main__ import main
from models.metrics import BAND_WIDTHS, confusion_by_ring
from models.reports import caption, format_table, summarise_image
from models.stages import evaluate
from models.stages.evaluate import (
    EvaluationError,
    add_arguments,
    open_predictor,
    summarise,
    worst_first,
)
from service.artefact.labels import VOC_LABELS, LabelSet
from service.artefact.manifest import Accuracy
from service.artefact.voc import CLASSES
from tests.voc_data import make_voc, write_mask

CAT, DOG, SHEEP = (CLASSES.index(name) for name in ("cat", "dog", "sheep"))


def counts_of(**pairs: int) -> NDArray[np.int64]:
    """(21, 21): ``cat_dog=3`` is three pixels of cat predicted as dog."""
    counts = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    for pair, pixels in pairs.items():
        truth, prediction = pair.split("_")
        counts[CLASSES.index(truth), CLASSES.index(prediction)] = pixels
    return counts


def test_the_worst_image_comes_first() -> None:
    """By mean IoU over the classes in truth or prediction; an all-void image is left out."""
    images = np.stack(
        [
            counts_of(cat_cat=100),
            counts_of(),
            # As many correct pixels as the next, but one more wrong class.
            counts_of(cat_cat=90, cat_dog=5, cat_sheep=5),
            counts_of(cat_cat=90, cat_dog=10),
            counts_of(cat_dog=1),
        ]
    )
    assert worst_first(images) == [4, 2, 3, 0]


def test_confusions_are_named_by_their_pixels() -> None:
    """The three most frequent, as fractions of the known pixels; correct pixels are none."""
    counts = counts_of(cat_cat=50, cat_dog=30, background_cat=10, dog_dog=6, cat_sheep=3, dog_cat=1)
    summarised = summarise_image("2007_000001", counts, VOC_LABELS)
    assert summarised["confused"] == [
        {"truth": "cat", "prediction": "dog", "fraction": 0.3},
        {"truth": "background", "prediction": "cat", "fraction": 0.1},
        {"truth": "cat", "prediction": "sheep", "fraction": 0.03},
    ]
    assert summarised["miou"] == pytest.approx((0 + 50 / 94 + 6 / 37 + 0) / 4)
    assert caption(summarised) == (
        "2007_000001, mean IoU 0.17. "
        "Truth → prediction: cat → dog 30%, background → cat 10%, cat → sheep 3%"
    )


def test_an_image_without_a_mistake_names_none() -> None:
    """Its caption names none either."""
    summarised = summarise_image("2007_000001", counts_of(cat_cat=5), VOC_LABELS)
    assert summarised == {"name": "2007_000001", "miou": 1.0, "confused": []}
    assert caption(summarised) == "2007_000001, mean IoU 1.00."


def summarise_pairs(*pairs: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> dict[str, Any]:
    """Of images' truths and predictions."""
    counts = np.stack([confusion_by_ring(*pair, len(VOC_LABELS)) for pair in pairs])
    return summarise(counts.sum(axis=1), counts.sum(axis=0), VOC_LABELS)


def summary() -> dict[str, object]:
    """For two images: a cat on background, predicted too wide, and background alone."""
    truth = np.zeros((40, 100), dtype=np.uint8)
    truth[:, 50:] = CAT
    wide = np.where(np.arange(100) < 47, 0, CAT)[None].repeat(40, axis=0).astype(np.uint8)
    empty = np.zeros_like(truth)
    return summarise_pairs((truth, wide), (empty, empty))


def test_the_summary_is_json_and_the_manifests_accuracy() -> None:
    """Classes that do not occur have neither IoU nor interval."""
    found = json.loads(json.dumps(summary(), allow_nan=False))
    accuracy = Accuracy.model_validate(found["metrics"])
    assert accuracy.per_class_iou["cat"] == pytest.approx(50 / 53)
    assert accuracy.per_class_iou["dog"] is found["per_class_iou_interval"]["dog"] is None
    assert accuracy.miou == pytest.approx((147 / 150 + 50 / 53) / 2)
    low, high = found["miou_interval"]
    assert low < accuracy.miou < high == 1


def test_the_summary_holds_the_boundary_curve() -> None:
    """Three columns are wrong: a smaller share of a wider band."""
    found = summary()
    curve = found["boundary_miou_by_width"]
    assert isinstance(curve, dict)
    assert list(curve) == list(BAND_WIDTHS)
    assert curve[4] == pytest.approx((1 / 4 + 4 / 7) / 2)
    assert found["boundary_miou"] == curve[8] == pytest.approx((5 / 8 + 8 / 11) / 2)


def test_without_a_boundary_there_is_no_curve() -> None:
    """None in place of NaN, which JSON does not have."""
    empty = np.zeros((4, 4), dtype=np.uint8)
    found = summarise_pairs((empty, empty))
    assert found["boundary_miou"] is None
    assert set(found["boundary_miou_by_width"].values()) == {None}


def test_the_table_shows_interval_and_boundaries() -> None:
    """Beside the IoU of each class, of all, and of the bands."""
    report = {**summary(), "split": "val", "images": 2, "protocol": "mmseg"}
    lines = format_table(report).splitlines()
    shown = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert shown["cat"] == ["0.9434", "0.9434", "to", "0.9434"]
    assert shown["dog"] == ["-", "-"]
    assert shown["miou"][0] == "0.9617"
    assert shown["miou"][2:] == ["to", "1.0000"]
    assert shown["boundary_miou"] == ["0.6761"]
    assert any(line.startswith("mIoU within them") and "0.6761" in line for line in lines)
    assert any(line.startswith("this, on 2 images of val, mmseg") for line in lines)


def test_the_table_of_another_label_set() -> None:
    """Its own names, however long, and no figures published for VOC."""
    labels = LabelSet(names=("background", "a rather long class name"), colors=((0, 0, 0),) * 2)
    counts = np.array([[[3, 1], [0, 4]]], np.int64)
    summarised = summarise(counts, counts.repeat(len(BAND_WIDTHS) + 1, axis=0), labels)
    report = {**summarised, "split": "val", "images": 1, "protocol": "service"}
    heading, background, named, *rest = format_table(report).splitlines()
    assert named.startswith("a rather long class name   0.8000   ")
    assert heading.index("IoU") == background.index("0.7500") + 3
    assert not any("Keras-FCN" in line or "Published" in line for line in rest)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"classes": [], "ignore_index": 255}'])
def test_a_service_without_a_label_set_is_named(
    body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, in place of a traceback."""
    monkeypatch.setattr(evaluate, "request_service", lambda url: body)
    with pytest.raises(EvaluationError, match="http://x/classes: returned no label set"):
        evaluate.service_labels("http://x/")


@pytest.mark.parametrize("protocol", ["mmseg", "keras-fcn"])
def test_a_service_has_its_own_protocol_only(protocol: str) -> None:
    """The message names the protocol and the options that support it."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--url", "http://x", "--data", "x", "--protocol", protocol])
    with pytest.raises(EvaluationError, match=rf"{protocol} needs --checkpoint or --artifact"):
        open_predictor(args)


def test_masks_without_two_classes_are_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks of 0 and 255 would score the background alone."""
    data = make_voc(tmp_path, images=2)
    for path in data.glob("VOC2012/SegmentationClass*/*.png"):
        mask = np.zeros((96, 128), np.uint8)
        mask[20:60] = 255
        write_mask(path, mask)

    def predict(image: Image.Image) -> NDArray[np.uint8]:
        return np.zeros(image.size[::-1], np.uint8)

    monkeypatch.setattr(evaluate, "open_predictor", lambda _: (predict, VOC_LABELS, {}))
    out = tmp_path / "out"
    command = ["evaluate", "--url", "http://x", "--data", str(data), "--out", str(out)]
    assert main(command) == 1
    assert "the masks of val show background and void only" in capsys.readouterr().err
    assert not out.exists()
