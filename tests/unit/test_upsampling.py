"""Upsampling compared with PyTorch's in float64."""

import tracemalloc

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from service.artefact.preprocessing import Geometry
from service.inference import upsampling
from service.inference.upsampling import upsample

STRIDE = 16
SHAPES = ((64, 96), (96, 64), (96, 96))


def random_logits(geometry: Geometry, classes: int = 21, seed: int = 0) -> npt.NDArray[np.float32]:
    """Logits of the size that a network of stride 16 gives."""
    height, width = geometry.padded
    size = (classes, height // STRIDE, width // STRIDE)
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def reference(logits: npt.NDArray[np.float32], geometry: Geometry) -> npt.NDArray[np.float64]:
    """Upsampled logits (C, H, W) in float64: PyTorch's interpolation by the geometry's scale."""
    scale = [
        photo * STRIDE / resized
        for photo, resized in zip(geometry.photo, geometry.resized, strict=True)
    ]
    # PyTorch derives the output's size from the scale: one more logit, repeated at the border as
    # clamping does, makes it large enough; most of the padding would only take time.
    padded = F.pad(torch.from_numpy(logits)[None].double(), (0, 1, 0, 1), mode="replicate")
    height, width = (resized // STRIDE + 2 for resized in geometry.resized)
    valid = padded[:, :, :height, :width]
    # PyTorch copies along an axis of equal sizes, whatever the scale says: make them differ.
    for axis, one in ((2, scale[0]), (3, scale[1])):
        while one != 1 and int(valid.shape[axis] * one) == valid.shape[axis]:
            valid = F.pad(valid, (0, axis == 3, 0, axis == 2), mode="replicate")
    full = F.interpolate(valid, scale_factor=scale, mode="bilinear", align_corners=False)
    result: npt.NDArray[np.float64] = full[0, :, : geometry.photo[0], : geometry.photo[1]].numpy()
    assert result.shape[1:] == geometry.photo
    return result


def assert_same_but_for_ties(
    mask: npt.NDArray[np.uint8], expected: npt.NDArray[np.floating], *, clear_part: float = 0.9
) -> None:
    """The mask is the argmax, except where float32 cannot separate the two best classes."""
    assert mask.shape == expected.shape[1:]
    best, second = np.partition(expected, (-2, -1), axis=0)[:-3:-1]
    clear = best - second > 8 * np.finfo(np.float32).eps * max(1.0, np.abs(expected).max())
    assert clear.mean() >= clear_part
    assert np.array_equal(mask[clear], expected.argmax(axis=0)[clear])


def winners_softmax(expected: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The winner's softmax probability (H, W) of (C, H, W) logits."""
    result: npt.NDArray[np.float64] = 1 / np.exp(expected - expected.max(axis=0)).sum(axis=0)
    return result


def smooth_logits(geometry: Geometry, seed: int) -> npt.NDArray[np.float32]:
    """A few blobs on background, as a network's logits look."""
    generator = np.random.default_rng(seed)
    height, width = geometry.padded[0] // STRIDE, geometry.padded[1] // STRIDE
    y, x = np.mgrid[:height, :width]
    logits = generator.normal(-4, 0.5, (21, height, width))
    logits[0] = 6
    for class_id in generator.choice(np.arange(1, 21), 3, replace=False):
        top, left = generator.uniform(0, height), generator.uniform(0, width)
        distance = np.hypot(y - top, x - left) / (0.3 * max(height, width))
        logits[class_id] += 18 * np.exp(-(distance**2))
    return logits.astype(np.float32)


def adversarial_logits(kind: str, geometry: Geometry, seed: int) -> npt.NDArray[np.float32]:
    """Logits that are hard for an algorithm that uses only the cells' corners."""
    noise = random_logits(geometry, seed=seed)
    _, height, width = noise.shape
    parity = np.indices((height, width)).sum(axis=0) % 2 == 0
    logits = np.zeros_like(noise)
    match kind:
        case "ties":
            logits[:] = noise.round()
        case "crossing":
            logits[3] = np.linspace(-1, 1, width)
            logits[7] = np.linspace(1, -1, height)[:, None]
        case "checkerboard":
            logits[2], logits[5] = parity * 4.0, ~parity * 3.0
            # Never first at a corner, and first in the middle of the cells.
            logits[1] = 2.5
        case "spike":
            logits[0] = 1
            logits[20, height // 3, width // 3] = 50
        case "huge":
            logits[:] = noise * 1e4
        case "masked":
            logits[:] = noise
            logits[5:] = -1e4
    return logits


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 160), st.integers(0, 9))
def test_mask_and_confidence_are_the_references(
    height: int, width: int, max_side: int, seed: int
) -> None:
    """Any photo size, up and down, padded or not, smooth and noisy."""
    geometry = Geometry.plan((height, width), max_side, SHAPES)
    for logits in (random_logits(geometry, seed=seed), smooth_logits(geometry, seed)):
        expected = reference(logits, geometry)
        labels = upsample(logits, geometry, with_confidence=True)
        assert_same_but_for_ties(labels.mask, expected)
        assert np.array_equal(upsample(logits, geometry).mask, labels.mask)
        assert labels.confidence is not None
        assert labels.confidence == pytest.approx(255 * winners_softmax(expected), abs=1.0)


@pytest.mark.parametrize("classes", [1, 2, 150, 255])
def test_any_number_of_classes(classes: int) -> None:
    """Up to 255, the most that a uint8 mask and an ignore index hold; ids reach the last one."""
    geometry = Geometry.plan((90, 140), 96, SHAPES)
    logits = random_logits(geometry, classes)
    logits[-1, 2:4, 1:3] += 20
    expected = reference(logits, geometry)
    labels = upsample(logits, geometry, with_confidence=True)
    if classes > 1:
        assert_same_but_for_ties(labels.mask, expected)
    assert labels.mask.max() == classes - 1
    assert labels.confidence is not None
    assert labels.confidence == pytest.approx(255 * winners_softmax(expected), abs=1.0)
    means = labels.class_confidence()
    for index in np.unique(labels.mask):
        mean = winners_softmax(expected)[labels.mask == index].mean()
        assert means[index] == pytest.approx(mean, abs=1 / 255)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["ties", "crossing", "checkerboard", "spike", "huge", "masked"]),
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(32, 160),
    st.integers(0, 9),
)
def test_adversarial_logits(kind: str, height: int, width: int, max_side: int, seed: int) -> None:
    """Ties, crossings, classes that lead at no corner, spikes, and logits of any magnitude."""
    geometry = Geometry.plan((height, width), max_side, SHAPES)
    logits = adversarial_logits(kind, geometry, seed)
    expected = reference(logits, geometry)
    labels = upsample(logits, geometry, with_confidence=True)
    assert_same_but_for_ties(labels.mask, expected, clear_part=0)
    assert labels.confidence is not None
    # float32 logits of 1e4 carry an error of 1e-2, which the softmax shows.
    close = np.abs(labels.confidence - 255 * winners_softmax(expected)) <= 1
    assert close.mean() > (0.95 if kind == "huge" else 0.9999)


def test_a_class_may_win_without_leading_at_a_corner() -> None:
    """Second at all corners, first in the middle."""
    geometry = Geometry((96, 96), (96, 96), (96, 96))
    logits = adversarial_logits("checkerboard", geometry, 0)
    assert (upsample(logits, geometry).mask == 1).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [slice(None), slice(3, 9), slice(20, None)])
def test_logits_that_are_not_finite_still_give_classes(value: float, part: slice) -> None:
    """A broken network must not stop the service."""
    geometry = Geometry.plan((70, 90), 96, SHAPES)
    logits = random_logits(geometry)
    logits[part, ::2] = value
    labels = upsample(logits, geometry, with_confidence=True)
    assert labels.mask.max() < 21


def test_batches_do_not_show() -> None:
    """One cell at a time gives the same mask and confidence as all at once."""
    geometry = Geometry.plan((97, 131), 96, SHAPES)
    logits = random_logits(geometry)
    whole = upsample(logits, geometry, with_confidence=True)
    small = upsample(logits, geometry, with_confidence=True, batch_pixels=1)
    assert np.array_equal(whole.mask, small.mask)
    assert whole.confidence is not None and small.confidence is not None
    assert np.array_equal(whole.confidence, small.confidence)


def test_both_ways_of_painting_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches painted by index and patches painted by slice give the same mask and confidence."""
    for size in ((97, 131), (40, 33), (1, 90), (90, 1)):
        geometry = Geometry.plan(size, 96, SHAPES)
        logits = random_logits(geometry)
        monkeypatch.setattr(upsampling, "SMALL_PATCH", 2**30)
        by_index = upsample(logits, geometry, with_confidence=True)
        monkeypatch.setattr(upsampling, "SMALL_PATCH", 0)
        by_slice = upsample(logits, geometry, with_confidence=True)
        assert np.array_equal(by_index.mask, by_slice.mask)
        assert by_index.confidence is not None and by_slice.confidence is not None
        assert np.array_equal(by_index.confidence, by_slice.confidence)


def test_long_cells_are_cut_without_a_seam() -> None:
    """Cells of 750 pixels are more than one patch each."""
    geometry = Geometry.plan((1500, 120), 32, SHAPES)
    logits = random_logits(geometry)
    assert_same_but_for_ties(upsample(logits, geometry).mask, reference(logits, geometry))


@pytest.mark.parametrize("with_confidence", [False, True])
@pytest.mark.parametrize("kind", ["smooth", "noisy"])
@pytest.mark.parametrize("photo", [(3000, 4000), (12_000_000, 1)])
def test_memory_is_bounded(photo: tuple[int, int], kind: str, with_confidence: bool) -> None:
    """12 megapixels take at most 10 MB beyond the result, for any logits."""
    geometry = Geometry.plan(photo, 512, ((384, 512),))
    make = smooth_logits if kind == "smooth" else random_logits
    logits = make(geometry, seed=0)
    tracemalloc.start()
    try:
        upsample(logits, geometry, with_confidence=with_confidence)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - 12e6 * (1 + with_confidence) < 10e6


def test_unpadded_is_onnx_resize() -> None:
    """Without padding it is ONNX's own linear Resize with half-pixel centres."""
    geometry = Geometry((96, 96), (96, 96), (96, 96))
    logits = random_logits(geometry)
    resize = helper.make_node(
        "Resize",
        ["logits", "", "", "sizes"],
        ["big"],
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    graph = helper.make_graph(
        [resize],
        "resize",
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 21, 6, 6]),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]),
        ],
        [helper.make_tensor_value_info("big", TensorProto.FLOAT, [1, 21, 96, 96])],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    ).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    sizes = np.array([1, 21, 96, 96], dtype=np.int64)
    (big,) = session.run(None, {"logits": logits[None], "sizes": sizes})
    assert_same_but_for_ties(upsample(logits, geometry).mask, big[0])


def test_class_confidence_is_the_mean_over_a_classs_pixels() -> None:
    """For each class present, over its own pixels; 0 for the others."""
    geometry = Geometry.plan((70, 50), 64, SHAPES)
    logits = random_logits(geometry, classes=5)
    labels = upsample(logits, geometry, with_confidence=True)
    winner = winners_softmax(reference(logits, geometry))
    expected = np.zeros(256)
    for index in np.unique(labels.mask):
        expected[index] = winner[labels.mask == index].mean()
    assert labels.class_confidence() == pytest.approx(expected, abs=1 / 255)


def test_confidence_only_where_asked() -> None:
    """The softmax costs time, so it is computed only on request."""
    geometry = Geometry.plan((64, 96), 96, SHAPES)
    labels = upsample(random_logits(geometry), geometry)
    assert labels.confidence is None
    assert not labels.class_confidence().any()


def test_ties_go_to_the_lower_class() -> None:
    """Equal logits everywhere are background, as np.argmax says."""
    geometry = Geometry.plan((64, 96), 96, SHAPES)
    logits = np.ones((21, 4, 6), dtype=np.float32)
    assert not upsample(logits, geometry).mask.any()


@pytest.mark.parametrize("photo", [(1, 100_000), (100_000, 1)])
def test_a_line_of_pixels_is_a_photo(photo: tuple[int, int]) -> None:
    """Extreme sides work."""
    geometry = Geometry.plan(photo, 96, SHAPES)
    logits = random_logits(geometry)
    assert_same_but_for_ties(upsample(logits, geometry).mask, reference(logits, geometry))
