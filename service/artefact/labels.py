"""A model's label set: the names and colours of its classes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Annotated, Final, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from service.artefact import voc
from service.errors import InvalidParameter

MAX_CLASSES: Final = 255
"""Class ids are uint8, and one value is reserved for void."""

VOID_COLOR: Final = (224, 224, 192)
"""RGB of void pixels in a palette: the cream of VOC's borders."""

Level = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Level, Level, Level]
"""RGB, each channel in [0, 255]."""

_LONGEST_NAME: Final = 64


def _is_name(text: str) -> bool:
    """Whether ``text`` can be an item of a comma-separated list, in JSON and in headings."""
    printable = text.isprintable() and text == text.strip()
    return printable and 0 < len(text) <= _LONGEST_NAME and "," not in text


class LabelSet(BaseModel):
    """Names and colours by class id, immutable. Class 0 is the background.

    ``names`` and ``colors`` have one entry per class id, 1 to 255 in all. ``ignore_index`` is the
    value of void pixels in training masks; it is not a class id. Names are distinct, have at most
    64 characters and contain no comma, so that ``classes=person,dog`` is unambiguous.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    colors: tuple[Color, ...]
    ignore_index: int = Field(255, ge=0, le=255)

    @field_validator("names")
    @classmethod
    def _names_are_distinct_words(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(names):
            if not _is_name(name):
                raise ValueError(
                    f"class {index}: {name[:_LONGEST_NAME]!r} is not a name of 1 to "
                    f"{_LONGEST_NAME} characters without commas"
                )
            if name in names[:index]:
                raise ValueError(f"classes {names.index(name)} and {index} are both {name!r}")
        return names

    @model_validator(mode="after")
    def _one_color_for_each_name(self) -> Self:
        if len(self.colors) != len(self.names):
            raise ValueError(f"{len(self.names)} classes, but {len(self.colors)} colors")
        if self.ignore_index < len(self.names):
            raise ValueError(f"ignore_index {self.ignore_index} is the id of a class")
        return self

    def __len__(self) -> int:
        return len(self.names)

    @property
    def foreground(self) -> frozenset[int]:
        """All class ids except the background's."""
        return frozenset(range(1, len(self.names)))

    def ids(self, names: Iterable[str]) -> frozenset[int]:
        """The ids of the named classes; spaces around a name are ignored.

        Raises `InvalidParameter` for an unknown name.
        """
        ids = set()
        for name in map(str.strip, names):
            if name not in self.names:
                raise InvalidParameter(
                    f"classes: no class {name[:_LONGEST_NAME]!r}; there are {', '.join(self.names)}"
                )
            ids.add(self.names.index(name))
        return frozenset(ids)

    @cached_property
    def palette(self) -> npt.NDArray[np.uint8]:
        """``(256, 3) uint8`` RGB, read-only: the palette of an indexed PNG, void included.

        Rows without a class have VOC's colours.
        """
        palette = voc.color_map()
        palette[self.ignore_index] = VOID_COLOR
        palette[: len(self.colors)] = self.colors
        palette.setflags(write=False)
        return palette


VOC_LABELS: Final = LabelSet(
    names=voc.CLASSES,
    colors=[tuple(color) for color in voc.PALETTE.tolist()],
    ignore_index=voc.IGNORE_INDEX,
)
"""The label set of a model that names no other."""
