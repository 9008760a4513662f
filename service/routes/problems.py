"""Errors as RFC 9457 problem details: the one place where an exception becomes a status."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service import errors
from service.schemas import ErrorMessage, ParameterProblem, Problem

MEDIA_TYPE: Final = "application/problem+json"

PROTOCOLS: Final = ("/v2", "/hf", "/label-studio")
"""Paths that speak other services' protocols: there an error is ``{"error": "what is wrong"}``."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem: its status, its stable ``type`` and its title."""

    status: HTTPStatus
    type: str
    title: str


INTERNAL: Final = Kind(
    HTTPStatus.INTERNAL_SERVER_ERROR, "/problems/internal-error", "Internal error"
)

LOGGED: Final = "The error was logged under this request's id."

KINDS: Final[dict[type[errors.SegmentError], Kind]] = {
    errors.MalformedRequest: Kind(
        HTTPStatus.BAD_REQUEST, "/problems/malformed-request", "Malformed request"
    ),
    errors.NoImage: Kind(HTTPStatus.BAD_REQUEST, "/problems/no-image", "No image was sent"),
    errors.NotAcceptable: Kind(
        HTTPStatus.NOT_ACCEPTABLE, "/problems/not-acceptable", "No acceptable representation"
    ),
    errors.BodyTooLarge: Kind(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "/problems/body-too-large", "Too many bytes"
    ),
    errors.ImageTooLarge: Kind(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "/problems/image-too-large", "Too many pixels"
    ),
    errors.UnsupportedImageType: Kind(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "/problems/unsupported-image-type",
        "Not an image of an allowed type",
    ),
    errors.UndecodableImage: Kind(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "/problems/undecodable-image",
        "The image cannot be decoded",
    ),
    errors.ImageUnavailable: Kind(
        HTTPStatus.BAD_GATEWAY, "/problems/image-unavailable", "The image cannot be fetched"
    ),
    errors.InvalidParameter: Kind(
        HTTPStatus.UNPROCESSABLE_ENTITY, "/problems/invalid-parameter", "Invalid parameter"
    ),
    errors.UnknownModel: Kind(HTTPStatus.NOT_FOUND, "/problems/unknown-model", "No such model"),
    errors.ModelUnavailable: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/model-unavailable", "The model is unavailable"
    ),
    errors.Overloaded: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/overloaded", "The service is overloaded"
    ),
    errors.Draining: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/not-ready", "The service is not ready"
    ),
    errors.DeadlineExceeded: Kind(
        HTTPStatus.GATEWAY_TIMEOUT, "/problems/deadline-exceeded", "The answer took too long"
    ),
}

_STATUS_KINDS: Final = {
    400: Kind(HTTPStatus.BAD_REQUEST, "/problems/malformed-request", "Malformed request"),
    404: Kind(HTTPStatus.NOT_FOUND, "/problems/not-found", "No such resource"),
    405: Kind(
        HTTPStatus.METHOD_NOT_ALLOWED, "/problems/method-not-allowed", "Method not allowed here"
    ),
}

DESCRIPTIONS: Final = {
    400: "Malformed request, or no image in it",
    404: "No such model, or not that version of it",
    406: "No acceptable representation; `available` lists what there is",
    413: "Too many bytes or pixels",
    415: "Not an image of an allowed type, judged by its bytes",
    422: "A parameter is out of range, or the image cannot be decoded",
    502: "An image could not be fetched from where it is kept",
    503: "Overloaded or draining; `Retry-After` says when to try again",
    504: "The deadline passed",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` of an endpoint's problems."""
    return {
        status: {
            "description": DESCRIPTIONS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


def documented_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` of the errors of an endpoint under `PROTOCOLS`."""
    return {
        status: {"description": DESCRIPTIONS[status], "model": ErrorMessage} for status in statuses
    }


def problem_response(
    scope: Scope,
    kind: Kind,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    available: list[str] | None = None,
    parameters: list[ParameterProblem] | None = None,
) -> Response:
    """One problem as a response."""
    scope["state"]["problem"] = kind.type  # for the metrics
    if any(f"{scope['path']}/".startswith(f"{prefix}/") for prefix in PROTOCOLS):
        message = ErrorMessage(error=detail)
        return Response(
            message.model_dump_json(),
            status_code=kind.status,
            media_type="application/json",
            headers=headers,
        )
    problem = Problem(
        type=kind.type,
        title=kind.title,
        status=kind.status,
        detail=detail,
        instance=scope["path"],
        request_id=scope["state"]["request_id"],
        available=available,
        errors=parameters,
    )
    return Response(
        problem.model_dump_json(exclude_none=True),
        status_code=kind.status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )


def embedded_problem(scope: Scope, exc: Exception) -> Problem:
    """What went wrong with one part of a request, as a part of its answer."""
    kind = _kind_of(exc)
    return Problem(
        type=(kind or INTERNAL).type,
        title=(kind or INTERNAL).title,
        status=(kind or INTERNAL).status,
        detail=LOGGED if kind is None else str(exc),
        instance=scope["path"],
        request_id=scope["state"]["request_id"],
    )


def add_handlers(app: FastAPI) -> None:
    """Make ``app`` answer every expected error as a problem.

    What nobody expected is left to `service.routes.middleware`.
    """
    app.add_exception_handler(errors.SegmentError, _segment_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)


def _kind_of(exc: Exception) -> Kind | None:
    return next((KINDS[cls] for cls in type(exc).__mro__ if cls in KINDS), None)


async def _segment_error(request: Request, exc: Exception) -> Response:
    kind = _kind_of(exc)
    if kind is None:  # no caller's doing: logged with its cause, answered without it
        raise exc
    headers = {}
    if kind.status == HTTPStatus.SERVICE_UNAVAILABLE:
        retry_after_s = exc.retry_after_s if isinstance(exc, errors.Overloaded) else 1
        headers["Retry-After"] = str(math.ceil(retry_after_s))
    available = list(exc.available) if isinstance(exc, errors.NotAcceptable) else None
    return problem_response(request.scope, kind, str(exc), headers=headers, available=available)


async def _validation_error(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, RequestValidationError):
        raise exc
    parameters = [
        ParameterProblem(parameter=str(error["loc"][-1]), message=error["msg"])
        for error in exc.errors()
    ]
    detail = "; ".join(f"{one.parameter}: {one.message}" for one in parameters)
    kind = KINDS[errors.InvalidParameter]
    return problem_response(request.scope, kind, detail, parameters=parameters)


async def _http_exception(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):
        raise exc
    kind = _STATUS_KINDS.get(exc.status_code)
    if kind is None:
        status = HTTPStatus(exc.status_code)
        kind = Kind(status, "about:blank", status.phrase)
    # Keeps what belongs to the status, such as 405's Allow.
    headers = dict(exc.headers) if exc.headers else None
    return problem_response(request.scope, kind, exc.detail, headers=headers)
