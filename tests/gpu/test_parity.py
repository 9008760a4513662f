"""The GPU path gives the CPU's masks, and fp16 gives fp32's, except for rounding."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.metrics import ConfusionMatrix
from service.inference.lanes import OUTPUT_BYTES, DeviceTask, Lane
from service.inference.upsampling import Labels
from tests.gpu.conftest import Gpu, Photo, differing, masks

NEAR_TIES = 1e-4
"""The allowed share of pixels with two classes so close that rounding decides."""

HALF_NEAR_TIES = 0.01
"""The same for fp16 against fp32 on a few photos; on VOC's val list `verify`'s gate applies."""

# `python -m models verify`: MIN_PIXEL_AGREEMENT and MAX_MEAN_IOU_LOSS of fp16. Importing them would
# import torch, which this environment does not have.
VERIFY_AGREEMENT = 0.995
VERIFY_MEAN_IOU_LOSS = 0.0005

SIZES = [
    *((375, 500), (500, 375), (512, 512), (640, 480), (1080, 1920)),
    *((1, 1), (1, 333), (333, 1), (7, 2000), (97, 331)),
]
"""Heights and widths: listed and other shapes, smaller and larger than the network's input."""

TWELVE_MEGAPIXELS = (3000, 4000)


def assert_same(task: DeviceTask, found: Labels, wanted: Labels) -> None:
    """Equal except near ties, at most one in a small photo; confidences within 2 levels."""
    assert found.mask.shape == task.geometry.photo
    differs = found.mask != wanted.mask
    assert differs.sum() <= max(1, NEAR_TIES * differs.size)
    if task.with_confidence:
        assert found.confidence is not None and wanted.confidence is not None
        levels = np.abs(found.confidence.astype(int) - wanted.confidence)
        assert levels[~differs].max(initial=0) <= 2
    else:
        assert found.confidence is None


@pytest.mark.parametrize("size", SIZES)
def test_any_size_as_on_the_cpu(
    size: tuple[int, int],
    fp32_lane: Lane,
    photos: list[Photo],
    prepare: Callable[..., DeviceTask],
    on_cpu: Callable[[DeviceTask], Labels],
) -> None:
    """A single photo of any size gets the CPU's mask and confidences."""
    for photo in photos:
        task = prepare(photo, size, with_confidence=True)
        (found,) = fp32_lane.run([task])
        assert_same(task, found.labels, on_cpu(task))


@pytest.mark.parametrize("max_side", [64, 320, 768, 1024, 1280])
def test_any_working_size_as_on_the_cpu(
    max_side: int,
    fp32_lane: Lane,
    photos: list[Photo],
    prepare: Callable[..., DeviceTask],
    on_cpu: Callable[[DeviceTask], Labels],
) -> None:
    """Shapes that are not listed are neither captured nor warmed up, and get the CPU's mask."""
    task = prepare(photos[0], (450, 600), max_side=max_side)
    (found,) = fp32_lane.run([task])
    assert_same(task, found.labels, on_cpu(task))


def test_a_batch_of_different_sizes_as_on_the_cpu(
    fp32_lane: Lane,
    photos: list[Photo],
    prepare: Callable[..., DeviceTask],
    on_cpu: Callable[[DeviceTask], Labels],
) -> None:
    """Photos of different sizes, with and without confidences, share a batch."""
    sizes = [(375, 500), (300, 400), (1536, 2048), (30, 40), (480, 640)]
    tasks = [
        prepare(photos[nth % len(photos)], size, with_confidence=nth % 2 == 0)
        for nth, size in enumerate(sizes)
    ]
    assert len({task.geometry.padded for task in tasks}) == 1
    for task, found in zip(tasks, fp32_lane.run(tasks), strict=True):
        assert_same(task, found.labels, on_cpu(task))


def test_photos_larger_than_the_output_buffer(
    fp32_lane: Lane,
    photos: list[Photo],
    prepare: Callable[..., DeviceTask],
    on_cpu: Callable[[DeviceTask], Labels],
) -> None:
    """12 megapixels with confidences need two rounds of downloads; such photos share a batch."""
    height, width = TWELVE_MEGAPIXELS
    assert 2 * height * width > OUTPUT_BYTES
    large = [prepare(photo, TWELVE_MEGAPIXELS, with_confidence=True) for photo in photos[:2]]
    small = prepare(photos[2], (375, 500))
    wanted = {id(task): on_cpu(task) for task in (*large, small)}
    for tasks in ([large[0]], [large[0], small, large[1]]):
        for task, found in zip(tasks, fp32_lane.run(tasks), strict=True):
            assert_same(task, found.labels, wanted[id(task)])


def test_fp16_as_fp32(
    fp32_lane: Lane, fp16_lane: Lane, photos: list[Photo], prepare: Callable[..., DeviceTask]
) -> None:
    """At most one pixel in a hundred differs over all photos."""
    tasks = [prepare(photo, (512, 512)) for photo in photos]
    differ = [
        differing(half, full)
        for half, full in zip(masks(fp16_lane, tasks), masks(fp32_lane, tasks), strict=True)
    ]
    assert np.mean(differ) <= HALF_NEAR_TIES


def test_fp16_passes_the_gate_of_verify(
    devkit: Path, fp32_lane: Lane, fp16: Gpu, fp16_lane: Lane, prepare: Callable[..., DeviceTask]
) -> None:
    """On VOC's val list fp16 passes the gates for equal pixels and mean IoU. Needs ``--data``."""
    root = devkit / "VOC2012"
    names = (root / "ImageSets" / "Segmentation" / "val.txt").read_text(encoding="utf-8").split()
    full, half = ConfusionMatrix(), ConfusionMatrix()
    equal = total = 0
    for name in names:
        truth_path = root / "SegmentationClass" / f"{name}.png"
        if not truth_path.exists():
            continue
        with Image.open(root / "JPEGImages" / f"{name}.jpg") as photo:
            task = prepare(np.asarray(photo.convert("RGB")))
        with Image.open(truth_path) as image:
            truth = np.asarray(image)
        (wanted,), (found,) = masks(fp32_lane, [task]), masks(fp16_lane, [task])
        full.update(truth, wanted)
        half.update(truth, found)
        equal += int((wanted == found).sum())
        total += wanted.size
    assert total, f"{root}: no masks of the val list found"
    assert equal / total >= VERIFY_AGREEMENT
    assert full.mean_iou() - half.mean_iou() <= VERIFY_MEAN_IOU_LOSS
