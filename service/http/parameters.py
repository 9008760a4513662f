"""The parameters of the endpoints: a request's query string, and the text fields of its form."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl

from fastapi import Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError

from service.errors import MalformedRequest
from service.http.uploads import Fields
from service.jobs.messages import unknown_name
from service.runtime import Service
from service.views import Options, check_side

ModelQuery = Annotated[
    str | None, Query(description="name of a model that `GET /models` lists (default: the first)")
]
"""The parameter ``model`` of endpoints that have no other."""

_NAMES: Final = tuple(Options.model_fields)
_REMEMBERED_BYTES: Final = 1024
_SHOWN: Final = 80
# RFC 7578, section 4.6: a form may carry the codec of its fields in this one.
_CHARSET: Final = "_charset_"


def options_parameters() -> list[dict[str, Any]]:
    """OpenAPI's ``parameters`` of an endpoint that reads `Options`, as FastAPI describes them."""
    properties = Options.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": schema,
            "description": schema["description"],
        }
        for name, schema in properties.items()
    ]


async def read_options(request: Request, service: Service, fields: Fields = ()) -> Options:
    """The options in a request's query string and, once its body is read, in its form's fields.

    A name may be in either. Raises `RequestValidationError` for one that is unknown or given twice
    and for a wrong value, `InvalidParameter`, `UnknownModel` or `ModelUnavailable`.
    """
    query: bytes = request.scope["query_string"]
    if fields:
        options = _parse([*_pairs(query), *fields])
    elif len(query) <= _REMEMBERED_BYTES:
        options = _remembered(query)
    else:
        options = _parse(_pairs(query))
    check_side(options.max_side, service.settings.max_side)
    if options.classes is not None:
        # This loads the model, as the photo would: only then are its classes known.
        async with service.engines.use(options.model) as engine:
            engine.model.contract.labels.ids(options.class_names)
    return options


async def known_query(request: Request) -> None:
    """A dependency that raises `RequestValidationError` for parameters that the route lacks."""
    query: bytes = request.scope["query_string"]
    route = request.scope["route"]
    if query and isinstance(route, APIRoute):
        names = [field.alias for field in route.dependant.query_params]
        _unique(_pairs(query), names)


@lru_cache(maxsize=256)
def _remembered(query: bytes) -> Options:
    return _parse(_pairs(query))


def _pairs(query: bytes) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=256)
    except ValueError as exc:
        raise MalformedRequest("the query has too many parameters") from exc


def _parse(pairs: Fields) -> Options:
    given = _unique(pairs, _NAMES, lists=("classes",))
    try:
        return Options.model_validate(given)
    except ValidationError as exc:
        raise RequestValidationError(exc.errors(include_url=False)) from exc


def _unique(pairs: Fields, known: Sequence[str], lists: Collection[str] = ()) -> dict[str, str]:
    """The values by name; those of ``lists`` may be repeated, and are joined by commas."""
    given: dict[str, str] = {}
    for name, value in pairs:
        if name == _CHARSET:
            continue
        if name not in known:
            raise _problem(name, unknown_name(name, known))
        if name in given and name not in lists:
            raise _problem(name, "is given twice")
        given[name] = f"{given[name]},{value}" if name in given else value
    return given


def _problem(name: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": (name[:_SHOWN],), "msg": message}])
