"""Palette PNG, overlay and the other image files."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from service.artefact import voc
from service.images.encoding import (
    Cutout,
    Overlay,
    encode_grey,
    encode_image,
    encode_mask,
    limit_classes,
    look_up,
)


def test_mask_png_is_vocs_format() -> None:
    """8-bit, colour type 3, values are class ids, colours are VOC's 256."""
    mask = np.arange(21, dtype=np.uint8).reshape(3, 7)
    data = encode_mask(mask, voc.FULL_PALETTE)
    bit_depth, color_type = data[24], data[25]
    assert (bit_depth, color_type) == (8, 3)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), mask)
        assert image.getpalette() == voc.FULL_PALETTE.ravel().tolist()


def test_mask_png_is_read_as_vocs_ground_truth_is() -> None:
    """Read by Pillow, as torchvision and mmsegmentation do: ids by mode P, VOC's colours as RGB."""
    mask = np.array([[0, 8, 15], [20, 255, 1]], dtype=np.uint8)
    with Image.open(io.BytesIO(encode_mask(mask, voc.FULL_PALETTE))) as image:
        assert np.array_equal(np.array(image), mask)
        assert np.array_equal(np.array(image.convert("RGB")), voc.FULL_PALETTE[mask])
        assert "transparency" not in image.info


ANY_MASK = arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def read_png(data: bytes) -> npt.NDArray[np.uint8]:
    """Read a PNG's samples with Pillow after verifying its checksums."""
    with Image.open(io.BytesIO(data)) as image:
        image.verify()
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image)


@pytest.mark.parametrize("stripe_bytes", [1, 100, 1 << 18])
@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mask=ANY_MASK)
def test_mask_png_comes_back_exactly(
    monkeypatch: pytest.MonkeyPatch, stripe_bytes: int, mask: npt.NDArray[np.uint8]
) -> None:
    """Any ids, any size from one pixel on, in one stripe or many."""
    monkeypatch.setattr("service.images.stripes.STRIPE_BYTES", stripe_bytes)
    assert np.array_equal(read_png(encode_mask(mask, voc.FULL_PALETTE)), mask)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (300, 1000)])
def test_mask_png_of_long_runs(shape: tuple[int, int]) -> None:
    """Runs longer than deflate's longest match, across stripes and rows, with ids beyond VOC's."""
    mask = np.full(shape, 255, dtype=np.uint8)
    mask[shape[0] // 2 :, shape[1] // 3 :] = 7
    assert np.array_equal(read_png(encode_mask(mask, voc.FULL_PALETTE)), mask)


def test_mask_png_has_the_chunks_of_the_specification() -> None:
    """IHDR, the palette before the pixels, IEND; only the filter None."""
    data = encode_mask(np.zeros((3, 2), dtype=np.uint8), voc.FULL_PALETTE)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, chunks = 8, {}
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert checksum == zlib.crc32(name + body)
        chunks[name] = body
        place += 12 + length
    assert list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (2, 3, 8, 3, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes(3 * (1 + 2))


def test_mask_of_background_alone_is_8_bit_too() -> None:
    """One class does not shrink the format."""
    data = encode_mask(np.zeros((2, 2), dtype=np.uint8), voc.FULL_PALETTE)
    assert (data[24], data[25]) == (8, 3)


def test_overlay_blends_all_but_background() -> None:
    """Background keeps the photo; a class is half photo, half colour."""
    image = np.full((2, 2, 3), 100, dtype=np.uint8)
    mask = np.array([[0, 15], [8, 0]], dtype=np.uint8)
    blended = Overlay(image, mask, voc.FULL_PALETTE, 0.5)[:]
    assert blended.tolist() == [
        [[100, 100, 100], [146, 114, 114]],
        [[82, 50, 50], [100, 100, 100]],
    ]
    assert (image == 100).all()


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, (7, 8, 9)), (1.0, (192, 128, 128))])
def test_overlay_at_its_ends(alpha: float, expected: tuple[int, int, int]) -> None:
    """Alpha 0 is the photo, alpha 1 the colour, exactly."""
    image = np.array([[[7, 8, 9]]], dtype=np.uint8)
    mask = np.array([[15]], dtype=np.uint8)
    assert tuple(Overlay(image, mask, voc.FULL_PALETTE, alpha)[:][0, 0].tolist()) == expected


def test_overlay_of_many_stripes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stripes do not show."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    mask = rng.integers(0, 21, (13, 17), dtype=np.uint8)
    whole = Overlay(image, mask, voc.FULL_PALETTE, 0.3)[:]
    monkeypatch.setattr("service.images.stripes.STRIPE_BYTES", 60)
    assert np.array_equal(Overlay(image, mask, voc.FULL_PALETTE, 0.3)[:], whole)
    exact = np.where((mask == 0)[..., None], image, image * 0.7 + voc.PALETTE[mask] * 0.3)
    assert np.abs(whole - exact).max() <= 1.5


@pytest.mark.parametrize("kind", ["overlay", "cutout"])
def test_the_png_of_a_computed_image_needs_no_whole_image(kind: str) -> None:
    """Its rows are computed in stripes: 12 megapixels of one colour take less than 4 MB."""
    image = np.full((3000, 4000, 3), 90, dtype=np.uint8)
    mask = np.full((3000, 4000), 15, dtype=np.uint8)
    computed = (
        Cutout(image, mask, {15})
        if kind == "cutout"
        else (Overlay(image, mask, voc.FULL_PALETTE, 0.5))
    )
    tracemalloc.start()
    try:
        encode_image(computed, "PNG")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6


@pytest.mark.parametrize("stripe_bytes", [1, 50, 1 << 18])
def test_computed_rows_are_those_of_the_whole_image(
    stripe_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A PNG, read in stripes, shows what the whole image shows."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)
    mask = rng.integers(0, 21, (13, 17), dtype=np.uint8)
    for computed in (Overlay(image, mask, voc.FULL_PALETTE, 0.3), Cutout(image, mask, {0, 15})):
        whole = computed[:]
        with monkeypatch.context() as patch:
            patch.setattr("service.images.stripes.STRIPE_BYTES", stripe_bytes)
            assert np.array_equal(read_png(encode_image(computed, "PNG")), whole)


@pytest.mark.parametrize("stripe_bytes", [1, 100, 1 << 18])
def test_cutout_keeps_the_chosen_classes(
    stripe_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pixels are opaque; elsewhere all channels are zero."""
    monkeypatch.setattr("service.images.stripes.STRIPE_BYTES", stripe_bytes)
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (13, 17, 3), dtype=np.uint8)
    mask = rng.integers(0, 21, (13, 17), dtype=np.uint8)
    cut = Cutout(image, mask, {0, 15})[:]
    kept = np.isin(mask, [0, 15])
    assert np.array_equal(cut[..., 3], np.where(kept, 255, 0))
    assert np.array_equal(cut[kept][:, :3], image[kept])
    assert not cut[~kept].any()


def test_png_with_transparency_comes_back_exactly() -> None:
    """RGBA."""
    image = np.random.default_rng(0).integers(0, 256, (33, 47, 4), dtype=np.uint8)
    data = encode_image(image, "PNG")
    assert data[25] == 6
    assert np.array_equal(read_png(data), image)


@settings(deadline=None, max_examples=30)
@given(levels=ANY_MASK)
def test_grey_png_comes_back_exactly(levels: npt.NDArray[np.uint8]) -> None:
    """8-bit, colour type 0."""
    data = encode_grey(levels)
    assert (data[24], data[25]) == (8, 0)
    assert np.array_equal(read_png(data), levels)


def test_webp_keeps_transparency_exactly() -> None:
    """Colours are close; transparency is exact."""
    image = np.full((20, 30, 4), (200, 100, 50, 255), dtype=np.uint8)
    image[:, 17:] = 0
    with Image.open(io.BytesIO(encode_image(image, "WEBP"))) as decoded:
        assert (decoded.format, decoded.mode, decoded.size) == ("WEBP", "RGBA", (30, 20))
        pixels = np.asarray(decoded)
    assert np.array_equal(pixels[..., 3], image[..., 3])
    assert np.abs(pixels[:, :17].astype(int) - image[:, :17]).max() <= 12


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_encode_image(image_format: str) -> None:
    """The file is of the format asked for and of the photo's size."""
    image = np.full((10, 20, 3), 128, dtype=np.uint8)
    data = encode_image(image, image_format)  # type: ignore[arg-type]
    with Image.open(io.BytesIO(data)) as decoded:
        assert decoded.format == image_format
        assert np.abs(np.asarray(decoded).astype(int) - image).max() <= 2


@pytest.mark.parametrize("stripe_bytes", [1, 200, 1 << 18])
@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (33, 47), (200, 700)])
def test_image_png_comes_back_exactly(
    shape: tuple[int, int], stripe_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PNG is lossless, wherever stripes begin."""
    monkeypatch.setattr("service.images.stripes.STRIPE_BYTES", stripe_bytes)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(read_png(encode_image(image, "PNG")), image)


def test_jpeg_overlays_are_as_pillow_writes_them() -> None:
    """Quality 90 and 4:2:0."""
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    theirs = io.BytesIO()
    Image.fromarray(image).save(theirs, "JPEG", quality=90)
    with Image.open(io.BytesIO(encode_image(image, "JPEG"))) as ours, Image.open(theirs) as pillows:
        assert isinstance(ours, JpegImageFile)
        assert isinstance(pillows, JpegImageFile)
        assert ours.quantization == pillows.quantization
        assert get_sampling(ours) == get_sampling(pillows) == 2


def test_look_up_is_numpys() -> None:
    """Each id becomes its level, whatever the mask's memory layout."""
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 256, (20, 30), dtype=np.uint8)[::2, ::3]
    levels = rng.integers(0, 256, 256, dtype=np.uint8)
    assert np.array_equal(look_up(mask, levels), levels[mask])


def test_limit_classes_makes_the_others_background() -> None:
    """Only the chosen classes remain."""
    mask = np.array([[0, 8, 15, 255]], dtype=np.uint8)
    assert limit_classes(mask, {15}).tolist() == [[0, 0, 15, 0]]
