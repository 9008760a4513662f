"""The parameters that every way to segment photos takes."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Depends, Query

from service.artefact import voc
from service.errors import InvalidParameter
from service.http.dependencies import ReadyServiceDep
from service.settings import Settings
from service.views import MaskFormat, Options, View, class_ids

# For the description; whoever sends another one is told which there are.
_NAMES: Final = "|".join(voc.CLASSES)


async def get_options(
    service: ReadyServiceDep,
    view: Annotated[
        View,
        Query(
            description="`mask`: palette PNG of class ids. `overlay`: photo and colours blended. "
            "`cutout`: the photo where it shows the chosen classes (default: all but background), "
            "transparent elsewhere. `confidence`: greyscale PNG, the softmax probability of each "
            "pixel's class in 255ths, 0 outside the chosen classes"
        ),
    ] = "mask",
    alpha: Annotated[float, Query(ge=0, le=1, description="weight of an overlay's colours")] = 0.5,
    classes: Annotated[
        str | None,
        Query(
            description="names, comma-separated, that any view is limited to (default: all)",
            json_schema_extra={"pattern": f"^({_NAMES})(,({_NAMES}))*$"},
        ),
    ] = None,
    max_side: Annotated[
        int | None, Query(description="longest side that the network sees, pixels")
    ] = None,
    mask: Annotated[
        MaskFormat,
        Query(
            description="how JSON carries the mask: `rle`: COCO's run lengths, per class. "
            "`polygons`: COCO's polygons, per class. `png`: base64 of the palette PNG. `none`"
        ),
    ] = "rle",
    model: Annotated[
        str | None, Query(description="name of the model, of those that `GET /models` lists")
    ] = None,
) -> Options:
    """The options of a request, but for its media type. Raises `InvalidParameter`, `Draining`."""
    return Options(
        view=view,
        alpha=alpha,
        classes=None if classes is None else class_ids(classes.split(",")),
        max_side=checked_side(max_side, service.settings),
        mask=mask,
        model=model,
    )


OptionsDep = Annotated[Options, Depends(get_options)]


def checked_side(max_side: int | None, settings: Settings) -> int | None:
    """The same, if the settings allow it. Raises `InvalidParameter`."""
    if max_side is not None and not settings.min_side <= max_side <= settings.max_side:
        raise InvalidParameter(
            f"max_side: {max_side} is not in {settings.min_side} to {settings.max_side}"
        )
    return max_side
