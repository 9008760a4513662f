"""JPEG photos to send: from VOC, or from scikit-image's wheel."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps

LANDSCAPE: Final = (500, 375)
"""Width and height of most of VOC's photos."""

MEGAPIXELS_12: Final = (4000, 3000)

MIXED_SIZES: Final = (
    *((500, 375), (375, 500), (334, 500), (500, 281), (640, 480), (480, 640), (224, 224)),
    *((1024, 768), (768, 1024), (1280, 720), (1920, 1080), (1080, 1920), (1000, 200), (97, 331)),
)
"""Widths and heights for the memory test, in addition to a few photos of 12 megapixels."""

_BUNDLED: Final = ("astronaut", "chelsea", "coffee", "rocket")
_JPEG_QUALITY: Final = 90


def serving_photos(folder: Path, devkit: Path | None, wanted: int) -> list[Path]:
    """Write ``wanted`` landscape photos of 500x375 pixels into ``folder`` as JPEG files.

    From a ``VOCdevkit`` they are unchanged files of the val list whose file size is near the
    median, so that no unusual photo is first. Otherwise they are crops of scikit-image's photos.
    Raises `SystemExit` if the val list has too few photos of that size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = _voc(devkit, wanted) if devkit else _bundled(wanted)
    paths = []
    for number, data in enumerate(files):
        path = folder / f"photo_{number:02}.jpg"
        path.write_bytes(data)
        paths.append(path)
    return paths


def mixed_photos(folder: Path, sources: Sequence[Path]) -> list[Path]:
    """Write a hundred photos of `MIXED_SIZES` into ``folder``; one in 50 has 12 megapixels."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(100):
        size = MEGAPIXELS_12 if number % 50 == 7 else MIXED_SIZES[number % len(MIXED_SIZES)]
        path = folder / f"mixed_{number:02}.jpg"
        path.write_bytes(resized(sources[number % len(sources)], size))
        paths.append(path)
    return paths


def large_photo(folder: Path, source: Path) -> Path:
    """Write the source as a photo of 12 megapixels into ``folder``."""
    path = folder / "12_megapixels.jpg"
    path.write_bytes(resized(source, MEGAPIXELS_12))
    return path


def resized(source: Path, size: tuple[int, int]) -> bytes:
    """A photo cropped and scaled to ``size`` (width, height), as JPEG.

    An enlarged photo gets camera noise; without it, decoding would be unrealistically fast.
    """
    with Image.open(source) as image:
        small = image.width < size[0]
        fitted = ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC)
    if small:
        rng = np.random.default_rng(0)
        noise = rng.normal(0, 3, (size[1], size[0], 1)).astype(np.float32)
        fitted = Image.fromarray((np.asarray(fitted) + noise).clip(0, 255).astype(np.uint8))
    return _jpeg(fitted)


def _voc(devkit: Path, wanted: int) -> list[bytes]:
    root = devkit / "VOC2012"
    names = (root / "ImageSets" / "Segmentation" / "val.txt").read_text(encoding="utf-8").split()
    found = []
    for name in names:
        path = root / "JPEGImages" / f"{name}.jpg"
        if path.is_file():
            with Image.open(path) as image:
                if image.size == LANDSCAPE:
                    found.append(path.read_bytes())
    if len(found) < wanted:
        raise SystemExit(f"{devkit}: {len(found)} photos of 500x375 in its val list, not {wanted}")
    found.sort(key=len)
    first = (len(found) - wanted) // 2
    return found[first : first + wanted]


def _bundled(wanted: int) -> list[bytes]:
    from skimage import data

    pictures = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in _BUNDLED]
    rng = np.random.default_rng(0)
    files = []
    for number in range(wanted):
        picture = pictures[number % len(pictures)]
        centering = (float(rng.uniform()), float(rng.uniform()))
        crop = ImageOps.fit(picture, LANDSCAPE, Image.Resampling.BICUBIC, centering=centering)
        files.append(_jpeg(ImageOps.mirror(crop) if number // len(pictures) % 2 else crop))
    return files


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()
