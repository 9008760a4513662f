"""The parameters of every way to segment photos, as a dependency."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from service.errors import InvalidParameter
from service.http.dependencies import ReadyServiceDep
from service.settings import Settings
from service.views import MIN_SIDE, Options

ModelQuery = Annotated[
    str | None, Query(description="name of the model, of those that `GET /models` lists")
]
"""Of endpoints that take no other option."""


async def get_options(service: ReadyServiceDep, options: Annotated[Options, Query()]) -> Options:
    """The options of a request. Raises `InvalidParameter`, `Draining`."""
    check_side(options.max_side, service.settings)
    loaded = service.engines.loaded(options.model)
    if loaded is not None:
        # Before the photo is read; of a model that is not in memory, once it is loaded.
        loaded.contract.labels.ids(options.class_names)
    return options


OptionsDep = Annotated[Options, Depends(get_options)]


def check_side(max_side: int | None, settings: Settings) -> None:
    """Raise `InvalidParameter` unless the network may see photos of that longest side."""
    if max_side is not None and not MIN_SIDE <= max_side <= settings.max_side:
        raise InvalidParameter(f"max_side: {max_side} is not in {MIN_SIDE} to {settings.max_side}")
