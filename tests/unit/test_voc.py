"""PASCAL VOC's names and colours."""

import numpy as np
import pytest

from service.artefact import voc
from service.artefact.labels import VOC_LABELS


def test_palette_is_vocs() -> None:
    """The colours equal the development kit's, void included."""
    expected = {1: (128, 0, 0), 8: (64, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    palette = [tuple(color) for color in voc.FULL_PALETTE.tolist()]
    assert {index: palette[index] for index in expected} == expected
    assert palette[voc.IGNORE_INDEX] == (224, 224, 192)
    assert list(VOC_LABELS.colors) == palette[: voc.NUM_CLASSES]
    assert voc.PALETTE.shape == (21, 3)
    assert voc.PALETTE.dtype == np.uint8


def test_colors_are_distinct() -> None:
    """No two of the 256 colours are equal, so that a colour names its class."""
    assert len(np.unique(voc.FULL_PALETTE, axis=0)) == 256


def test_classes_are_vocs() -> None:
    """There are 21 names in VOC's order and spelling."""
    assert len(voc.CLASSES) == voc.NUM_CLASSES == 21
    assert voc.CLASSES[0] == "background"
    assert voc.CLASSES[11] == "diningtable"
    assert voc.CLASSES[-1] == "tvmonitor"
    assert sorted(voc.CLASSES[1:]) == list(voc.CLASSES[1:])


@pytest.mark.parametrize("size", [0, 257])
def test_a_palette_has_one_to_256_colors(size: int) -> None:
    """Another size is an error."""
    with pytest.raises(ValueError, match="1 to 256"):
        voc.color_map(size)


def test_the_palettes_cannot_be_changed() -> None:
    """The shared arrays are read-only."""
    with pytest.raises(ValueError, match="read-only"):
        voc.PALETTE[0] = 1
