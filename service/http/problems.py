"""Errors as RFC 9457 problem details: the one place where an exception becomes a status."""

from __future__ import annotations

import errno
import math
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from service import errors
from service.schemas import ErrorMessage, ParameterProblem, Problem
from service.telemetry.metrics import OTHER

MEDIA_TYPE: Final = "application/problem+json"


REFUSAL: Final = "refusal"
"""In a request's state: the error that is to be answered, because what came is no request."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of problem: its status, its stable ``type`` and its title."""

    status: HTTPStatus
    type: str
    title: str

    @property
    def reason(self) -> str:
        """What metrics and log call it: the end of ``type``; one that has no type is `OTHER`."""
        _, _, reason = self.type.rpartition("/problems/")
        return OTHER if ":" in reason else reason


INTERNAL: Final = Kind(
    HTTPStatus.INTERNAL_SERVER_ERROR, "/problems/internal-error", "Internal error"
)

LOGGED: Final = "The error was logged under this request's id."

KINDS: Final[dict[type[errors.SegmentError], Kind]] = {
    errors.MalformedRequest: Kind(
        HTTPStatus.BAD_REQUEST, "/problems/malformed-request", "Malformed request"
    ),
    errors.NoImage: Kind(HTTPStatus.BAD_REQUEST, "/problems/no-image", "No image was sent"),
    errors.RequestTimeout: Kind(
        HTTPStatus.REQUEST_TIMEOUT, "/problems/request-timeout", "The request came too slowly"
    ),
    errors.Unauthorized: Kind(
        HTTPStatus.UNAUTHORIZED, "/problems/unauthorized", "An API key is needed"
    ),
    errors.RateLimited: Kind(
        HTTPStatus.TOO_MANY_REQUESTS, "/problems/rate-limited", "Too many requests"
    ),
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
    errors.InferenceFailed: Kind(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/inference-failed", "The network failed"
    ),
    errors.DeadlineExceeded: Kind(
        HTTPStatus.GATEWAY_TIMEOUT, "/problems/deadline-exceeded", "The answer took too long"
    ),
}

_STATUS_KINDS: Final = {
    400: Kind(HTTPStatus.BAD_REQUEST, "/problems/malformed-request", "Malformed request"),
    401: KINDS[errors.Unauthorized],
    404: Kind(HTTPStatus.NOT_FOUND, "/problems/not-found", "No such resource"),
    405: Kind(
        HTTPStatus.METHOD_NOT_ALLOWED, "/problems/method-not-allowed", "Method not allowed here"
    ),
}

REASONS: Final = frozenset(
    kind.reason for kind in (INTERNAL, *KINDS.values(), *_STATUS_KINDS.values())
)
"""Of all problems that there are; what has no type of its own is counted as `OTHER`."""

_EXHAUSTED: Final = frozenset(
    {errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}
)

_log: Any = structlog.get_logger("service.problems")

DESCRIPTIONS: Final = {
    400: "Malformed request, or no image in it",
    401: "No API key was sent, or none that is known here",
    404: "No such model, or not that version of it",
    406: "No acceptable representation; `available` lists what there is",
    408: "The body came too slowly",
    413: "Too many bytes or pixels",
    415: "Not an image of an allowed type, judged by its bytes",
    422: "A parameter is out of range, or the image cannot be decoded",
    429: "More requests than one client may send; `Retry-After` says when to try again",
    502: "An image could not be fetched from where it is kept",
    503: "Overloaded, draining, or the network failed; `Retry-After` says when to try again",
    504: "The deadline passed",
}


_RETRY_AFTER: Final = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
_HEADERS: Final = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` of an endpoint's problems."""
    return {
        status: {
            "description": DESCRIPTIONS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            "headers": _HEADERS.get(status, {}),
        }
        for status in statuses
    }


def documented_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` of an endpoint of a `ServiceRouter` with foreign errors."""
    return {
        status: {
            "description": DESCRIPTIONS[status],
            "model": ErrorMessage,
            "headers": _HEADERS.get(status, {}),
        }
        for status in statuses
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
    scope["state"]["problem"] = kind.reason  # for metrics and log
    if scope["state"]["flags"].foreign_errors(scope):
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
    exc = _in_own_words(exc)
    found = _kind_of(exc)
    kind = found or INTERNAL
    scope["state"]["service"].metrics.refusal(kind.reason)
    return Problem(
        type=kind.type,
        title=kind.title,
        status=kind.status,
        detail=LOGGED if found is None else str(exc),
        instance=scope["path"],
        request_id=scope["state"]["request_id"],
    )


def _in_own_words(exc: Exception) -> Exception:
    """An `Overloaded` for what is raised where the machine has no more of something."""
    if not isinstance(exc, MemoryError) and getattr(exc, "errno", None) not in _EXHAUSTED:
        return exc
    _log.error("the machine is exhausted", reason=repr(exc))
    return errors.Overloaded("the machine is short of memory, disk or file descriptors", 1.0)


def add_handlers(app: FastAPI) -> None:
    """Make ``app`` answer every expected error as a problem.

    What nobody expected is left to `service.http.middleware`.
    """
    for expected in (errors.SegmentError, MemoryError, OSError):
        app.add_exception_handler(expected, _segment_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)


async def refusal(scope: Scope, exc: Exception) -> Response:
    """The answer to what came in place of a request: a `SegmentError` or an `HTTPException`."""
    handler = _http_exception if isinstance(exc, HTTPException) else _segment_error
    return await handler(Request(scope), exc)


def _kind_of(exc: Exception) -> Kind | None:
    return next((KINDS[cls] for cls in type(exc).__mro__ if cls in KINDS), None)


async def _segment_error(request: Request, exc: Exception) -> Response:
    exc = _in_own_words(exc)
    kind = _kind_of(exc)
    if kind is None:  # no caller's doing: logged with its cause, answered without it
        raise exc
    available = list(exc.available) if isinstance(exc, errors.NotAcceptable) else None
    headers = _headers(exc, kind)
    return problem_response(request.scope, kind, str(exc), headers=headers, available=available)


def _headers(exc: Exception, kind: Kind) -> dict[str, str]:
    if isinstance(exc, errors.Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(exc, errors.Overloaded | errors.RateLimited):
        return {"Retry-After": str(math.ceil(exc.retry_after_s))}
    if isinstance(exc, errors.Draining):
        return {"Retry-After": "1", "Connection": "close"}
    return {"Retry-After": "1"} if kind.status == HTTPStatus.SERVICE_UNAVAILABLE else {}


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
