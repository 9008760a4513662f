"""The query parameters of the endpoints that segment photos, as a dependency."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from service.http.dependencies import ReadyServiceDep
from service.views import Options, check_side

ModelQuery = Annotated[
    str | None, Query(description="name of a model that `GET /models` lists (default: the first)")
]
"""The parameter ``model`` of endpoints that have no other."""


async def get_options(service: ReadyServiceDep, options: Annotated[Options, Query()]) -> Options:
    """The options of a request, checked before its body is read.

    Raises `InvalidParameter`, `Draining`, `UnknownModel` or `ModelUnavailable`.
    """
    check_side(options.max_side, service.settings.max_side)
    if options.classes is not None:
        # This loads the model, as the photo would: only then are its classes known.
        async with service.engines.use(options.model) as engine:
            engine.model.contract.labels.ids(options.class_names)
    return options


OptionsDep = Annotated[Options, Depends(get_options)]
