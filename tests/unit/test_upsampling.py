"""Upsampling against a plain float64 reference."""

import numpy as np
import numpy.typing as npt
import onnxruntime as ort  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from service.preprocessing import Geometry
from service.upsampling import upsample

STRIDE = 16
SHAPES = ((64, 96), (96, 64), (96, 96))


def random_logits(geometry: Geometry, classes: int = 21, seed: int = 0) -> npt.NDArray[np.float32]:
    """Logits of the size that a network of stride 16 gives."""
    height, width = geometry.padded
    size = (classes, height // STRIDE, width // STRIDE)
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def reference(logits: npt.NDArray[np.float32], geometry: Geometry) -> npt.NDArray[np.float64]:
    """Upsampled logits (C, H, W), by the definition, whole and in float64."""
    corners = []
    for axis in (0, 1):
        size = geometry.photo[axis]
        scale = geometry.resized[axis] / (size * STRIDE)
        place = ((np.arange(size) + 0.5) * scale - 0.5).clip(0, logits.shape[1 + axis] - 1)
        low = np.floor(place).astype(int)
        corners.append((low, np.minimum(low + 1, logits.shape[1 + axis] - 1), place - low))
    (top, bottom, down), (left, right, along) = corners
    down = down[:, None]
    exact = logits.astype(np.float64)
    upper = exact[:, top][:, :, left] * (1 - along) + exact[:, top][:, :, right] * along
    lower = exact[:, bottom][:, :, left] * (1 - along) + exact[:, bottom][:, :, right] * along
    result: npt.NDArray[np.float64] = upper * (1 - down) + lower * down
    return result


def assert_same_but_for_ties(
    mask: npt.NDArray[np.uint8], expected: npt.NDArray[np.floating]
) -> None:
    """The mask is the argmax, but where float32 cannot tell the two best classes apart."""
    assert mask.shape == expected.shape[1:]
    best, second = np.sort(expected, axis=0)[::-1][:2]
    clear = best - second > 1e-4
    assert clear.mean() > 0.9
    assert np.array_equal(mask[clear], expected.argmax(axis=0)[clear])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(32, 160), st.integers(0, 9))
def test_mask_is_the_argmax_of_the_reference(
    height: int, width: int, max_side: int, seed: int
) -> None:
    """Any photo size, up and down, padded or not, gives the reference's mask."""
    geometry = Geometry.plan((height, width), max_side, SHAPES)
    logits = random_logits(geometry, seed=seed)
    assert_same_but_for_ties(upsample(logits, geometry).mask, reference(logits, geometry))


def test_stripes_and_tiles_do_not_show() -> None:
    """The smallest stripes and tiles give the same mask and confidence as one stripe."""
    geometry = Geometry.plan((97, 131), 96, SHAPES)
    logits = random_logits(geometry)
    whole = upsample(logits, geometry, with_confidence=True)
    small = upsample(logits, geometry, with_confidence=True, stripe_bytes=1, tile_width=7)
    assert np.array_equal(whole.mask, small.mask)
    assert whole.confidence == pytest.approx(small.confidence, abs=1e-6)


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


def test_confidence_is_the_mean_softmax_of_the_winner() -> None:
    """For each class present, over its own pixels; 0 for the others."""
    geometry = Geometry.plan((70, 50), 64, SHAPES)
    logits = random_logits(geometry, classes=5)
    labels = upsample(logits, geometry, with_confidence=True)
    exponentials = np.exp(reference(logits, geometry))
    winner = exponentials.max(axis=0) / exponentials.sum(axis=0)
    expected = [
        winner[labels.mask == index].mean() if (labels.mask == index).any() else 0.0
        for index in range(5)
    ]
    assert labels.confidence == pytest.approx(expected, abs=1e-5)


def test_confidence_only_where_asked() -> None:
    """The softmax costs time, so nobody pays for it unasked."""
    geometry = Geometry.plan((64, 96), 96, SHAPES)
    assert upsample(random_logits(geometry), geometry).confidence is None


def test_ties_go_to_the_lower_class() -> None:
    """Equal logits everywhere are background, as np.argmax says."""
    geometry = Geometry.plan((64, 96), 96, SHAPES)
    logits = np.ones((21, 4, 6), dtype=np.float32)
    assert not upsample(logits, geometry).mask.any()


@pytest.mark.parametrize("photo", [(1, 100_000), (100_000, 1)])
def test_a_line_of_pixels_is_a_photo(photo: tuple[int, int]) -> None:
    """Extreme sides work, in tiles and in stripes."""
    geometry = Geometry.plan(photo, 96, SHAPES)
    logits = random_logits(geometry)
    assert_same_but_for_ties(upsample(logits, geometry).mask, reference(logits, geometry))
