"""Label sets: valid names, colours and palettes."""

import numpy as np
import pytest
from pydantic import ValidationError

from service.artefact.labels import MAX_CLASSES, VOC_LABELS, LabelSet
from service.errors import InvalidParameter

NAMES = ("background", "chair", "dining table")
COLORS = ((0, 0, 0), (10, 20, 30), (255, 255, 255))


def test_ids_by_name() -> None:
    """Spaces around a name are ignored, spaces inside it are not."""
    labels = LabelSet(names=NAMES, colors=COLORS)
    assert labels.ids(["chair", " dining table "]) == {1, 2}
    assert labels.foreground == {1, 2}
    with pytest.raises(InvalidParameter, match="no class 'sofa'; there are background, chair, din"):
        labels.ids(["chair", "sofa"])


def test_the_palette_has_the_colors_of_the_classes() -> None:
    """The palette has 256 rows, cream for void, and is read-only; VOC's rows are distinct."""
    palette = LabelSet(names=NAMES, colors=COLORS, ignore_index=254).palette
    assert palette.shape == (256, 3)
    assert palette.dtype == np.uint8
    assert palette[:3].tolist() == [list(color) for color in COLORS]
    assert palette[254].tolist() == [224, 224, 192]
    with pytest.raises(ValueError, match="read-only"):
        palette[0] = 1
    assert VOC_LABELS.palette[255].tolist() == [224, 224, 192]
    assert len(np.unique(VOC_LABELS.palette, axis=0)) == 256


def test_at_most_255_classes() -> None:
    """One value of a byte is reserved for void."""
    names = [f"class {number}" for number in range(256)]
    labels = LabelSet(names=names[:MAX_CLASSES], colors=[(1, 2, 3)] * MAX_CLASSES)
    assert len(labels) == 255
    with pytest.raises(ValidationError, match="at most 255 items"):
        LabelSet(names=names, colors=[(1, 2, 3)] * 256)
    with pytest.raises(ValidationError, match="at least 1 item"):
        LabelSet(names=(), colors=())


@pytest.mark.parametrize(
    "name",
    ["", " chair", "chair ", "a,b", "a\nb", "a\x7f", "\ud800", "a\u202eb", "\u200b", "n" * 65],
)
def test_a_name_is_one_word_of_a_list(name: str) -> None:
    """Names must fit into comma-separated lists and headings."""
    with pytest.raises(ValidationError, match=r"class 1: .* is not a name"):
        LabelSet(names=("background", name), colors=COLORS[:2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": ("a", "b", "a"), "colors": COLORS}, "classes 0 and 2 are both 'a'"),
        ({"names": NAMES, "colors": COLORS[:2]}, "3 classes, but 2 colors"),
        ({"names": NAMES, "colors": COLORS, "ignore_index": 2}, "ignore_index 2 is the id of a"),
        ({"names": NAMES, "colors": [*COLORS[:2], (0, 0, 256)]}, "less than or equal to 255"),
    ],
)
def test_inconsistent_fields_are_refused(fields: dict[str, object], message: str) -> None:
    """The error names the reason."""
    with pytest.raises(ValidationError, match=message):
        LabelSet.model_validate(fields)
