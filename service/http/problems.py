"""Errors as RFC 9457 problem details: the only module that maps exceptions to statuses."""

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
"""Key in a request's state: the error with which the server refuses it before it is routed."""

REFUSAL_UNLESS_PROBE: Final = "refusal-unless-probe"
"""The same, for a request that is answered only if it is a probe."""


@dataclass(frozen=True, slots=True)
class ProblemType:
    """A problem type: its status, its stable ``type`` and its title."""

    status: HTTPStatus
    type: str
    title: str

    @property
    def reason(self) -> str:
        """Its name in metrics and log: the end of ``type``, or `OTHER` for ``about:blank``."""
        _, _, reason = self.type.rpartition("/problems/")
        return OTHER if ":" in reason else reason


INTERNAL: Final = ProblemType(
    HTTPStatus.INTERNAL_SERVER_ERROR, "/problems/internal-error", "Internal error"
)

LOGGED: Final = "The error was logged under this request's id."

PROBLEM_TYPES: Final[dict[type[errors.SegmentError], ProblemType]] = {
    errors.MalformedRequest: ProblemType(
        HTTPStatus.BAD_REQUEST, "/problems/malformed-request", "Malformed request"
    ),
    errors.NoImage: ProblemType(HTTPStatus.BAD_REQUEST, "/problems/no-image", "No image was sent"),
    errors.RequestTimeout: ProblemType(
        HTTPStatus.REQUEST_TIMEOUT, "/problems/request-timeout", "The request came too slowly"
    ),
    errors.Unauthorized: ProblemType(
        HTTPStatus.UNAUTHORIZED, "/problems/unauthorized", "An API key is needed"
    ),
    errors.RateLimited: ProblemType(
        HTTPStatus.TOO_MANY_REQUESTS, "/problems/rate-limited", "Too many requests"
    ),
    errors.NotAcceptable: ProblemType(
        HTTPStatus.NOT_ACCEPTABLE, "/problems/not-acceptable", "No acceptable representation"
    ),
    errors.BodyTooLarge: ProblemType(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "/problems/body-too-large", "Too many bytes"
    ),
    errors.ImageTooLarge: ProblemType(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "/problems/image-too-large", "Too many pixels"
    ),
    errors.UnsupportedImageType: ProblemType(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "/problems/unsupported-image-type",
        "Not an image of an allowed type",
    ),
    errors.UndecodableImage: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "/problems/undecodable-image",
        "The image cannot be decoded",
    ),
    errors.TooExpensive: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "/problems/too-expensive", "The image costs too much"
    ),
    errors.ImageUnavailable: ProblemType(
        HTTPStatus.BAD_GATEWAY, "/problems/image-unavailable", "The image cannot be fetched"
    ),
    errors.InvalidParameter: ProblemType(
        HTTPStatus.UNPROCESSABLE_ENTITY, "/problems/invalid-parameter", "Invalid parameter"
    ),
    errors.UnknownModel: ProblemType(
        HTTPStatus.NOT_FOUND, "/problems/unknown-model", "No such model"
    ),
    errors.ModelUnavailable: ProblemType(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/model-unavailable", "The model is unavailable"
    ),
    errors.WorkerLost: ProblemType(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/worker-lost", "The photo's process was lost"
    ),
    errors.Overloaded: ProblemType(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/overloaded", "The service is overloaded"
    ),
    errors.Draining: ProblemType(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/not-ready", "The service is not ready"
    ),
    errors.InferenceFailed: ProblemType(
        HTTPStatus.SERVICE_UNAVAILABLE, "/problems/inference-failed", "The network failed"
    ),
    errors.DeadlineExceeded: ProblemType(
        HTTPStatus.GATEWAY_TIMEOUT, "/problems/deadline-exceeded", "The answer took too long"
    ),
}

_STATUS_TYPES: Final = {
    400: ProblemType(HTTPStatus.BAD_REQUEST, "/problems/malformed-request", "Malformed request"),
    401: PROBLEM_TYPES[errors.Unauthorized],
    403: ProblemType(HTTPStatus.FORBIDDEN, "/problems/cross-site", "Another site's page sent this"),
    404: ProblemType(HTTPStatus.NOT_FOUND, "/problems/not-found", "No such resource"),
    405: ProblemType(
        HTTPStatus.METHOD_NOT_ALLOWED, "/problems/method-not-allowed", "Method not allowed here"
    ),
    421: ProblemType(
        HTTPStatus.MISDIRECTED_REQUEST, "/problems/unknown-host", "No such host is served here"
    ),
}

REASONS: Final = frozenset(
    problem_type.reason
    for problem_type in (INTERNAL, *PROBLEM_TYPES.values(), *_STATUS_TYPES.values())
)
"""The reasons of all problem types; other statuses count as `OTHER`."""

_EXHAUSTED: Final = frozenset(
    {errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}
)

_log: Any = structlog.get_logger("service.problems")

DESCRIPTIONS: Final = {
    400: "Malformed request, or no image in it",
    401: "The API key is missing or unknown",
    403: "A web page of another origin sent it",
    404: "No such model, or not that version of it",
    406: "No acceptable media type; `available` lists those there are",
    408: "The body came too slowly",
    413: "Too many bytes or pixels",
    415: "Not an image of an allowed type; its bytes decide, not its Content-Type",
    422: "A parameter is invalid, or the image cannot be decoded",
    429: "Rate limit exceeded; `Retry-After` says when to retry",
    502: "An image could not be fetched from its URL",
    503: "Overloaded, draining, or the network failed; `Retry-After` says when to retry",
    504: "The deadline passed",
}

_RETRY_AFTER: Final = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
_HEADERS: Final = {
    401: {"WWW-Authenticate": {"schema": {"type": "string"}}},
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` for an endpoint's problems."""
    return {
        status: {
            "description": DESCRIPTIONS[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
            "headers": _HEADERS.get(status, {}),
        }
        for status in statuses
    }


def documented_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI ``responses`` for the errors of a `ServiceRouter` with ``foreign_errors``."""
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
    problem_type: ProblemType,
    detail: str,
    *,
    headers: dict[str, str] | None = None,
    available: list[str] | None = None,
    parameters: list[ParameterProblem] | None = None,
) -> Response:
    """A problem as a response, in the format of the path's protocol."""
    scope["state"]["problem"] = problem_type.reason  # for metrics and log
    if scope["state"]["flags"].foreign_errors(scope):
        message = ErrorMessage(error=detail)
        return Response(
            message.model_dump_json(),
            status_code=problem_type.status,
            media_type="application/json",
            headers=headers,
        )
    problem = _problem(scope, problem_type, detail, available, parameters)
    return Response(
        problem.model_dump_json(exclude_none=True),
        status_code=problem_type.status,
        media_type=MEDIA_TYPE,
        headers=headers,
    )


def embedded_problem(scope: Scope, exc: Exception) -> Problem:
    """The problem of one part of a request, to include in the response."""
    exc = _translated(exc)
    found = _problem_type(exc)
    problem_type = found or INTERNAL
    scope["state"]["service"].metrics.refusal(problem_type.reason)
    return _problem(scope, problem_type, LOGGED if found is None else str(exc))


def _problem(
    scope: Scope,
    problem_type: ProblemType,
    detail: str,
    available: list[str] | None = None,
    parameters: list[ParameterProblem] | None = None,
) -> Problem:
    return Problem(
        type=problem_type.type,
        title=problem_type.title,
        status=problem_type.status,
        detail=detail,
        instance=scope["path"],
        request_id=scope["state"]["request_id"],
        available=available,
        errors=parameters,
    )


def _translated(exc: Exception) -> Exception:
    """``exc``, or `Overloaded` if the machine is out of memory, disk or file descriptors."""
    if not isinstance(exc, MemoryError) and getattr(exc, "errno", None) not in _EXHAUSTED:
        return exc
    _log.error("the machine is exhausted", reason=repr(exc))
    return errors.Overloaded("the machine is short of memory, disk or file descriptors", 1.0)


def add_handlers(app: FastAPI) -> None:
    """Make ``app`` respond to every expected error with a problem.

    `service.http.middleware` handles unexpected ones.
    """
    for expected in (errors.SegmentError, MemoryError, OSError):
        app.add_exception_handler(expected, _segment_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)


async def refusal(scope: Scope, exc: Exception) -> Response:
    """The response to a refused request; ``exc`` is a `SegmentError` or an `HTTPException`."""
    handler = _http_exception if isinstance(exc, HTTPException) else _segment_error
    return await handler(Request(scope), exc)


def _problem_type(exc: Exception) -> ProblemType | None:
    return next((PROBLEM_TYPES[cls] for cls in type(exc).__mro__ if cls in PROBLEM_TYPES), None)


async def _segment_error(request: Request, exc: Exception) -> Response:
    exc = _translated(exc)
    problem_type = _problem_type(exc)
    if problem_type is None:  # not the caller's fault: the middleware logs it and responds 500
        raise exc
    available = list(exc.available) if isinstance(exc, errors.NotAcceptable) else None
    headers = _headers(exc, problem_type)
    return problem_response(
        request.scope, problem_type, str(exc), headers=headers, available=available
    )


def _headers(exc: Exception, problem_type: ProblemType) -> dict[str, str]:
    if isinstance(exc, errors.Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(exc, errors.Overloaded | errors.RateLimited):
        return {"Retry-After": str(math.ceil(exc.retry_after_s))}
    if isinstance(exc, errors.Draining):
        return {"Retry-After": "1", "Connection": "close"}
    return {"Retry-After": "1"} if problem_type.status == HTTPStatus.SERVICE_UNAVAILABLE else {}


async def _validation_error(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, RequestValidationError):
        raise exc
    parameters = [
        ParameterProblem(parameter=str(error["loc"][-1]), message=error["msg"])
        for error in exc.errors()
    ]
    detail = "; ".join(f"{one.parameter}: {one.message}" for one in parameters)
    problem_type = PROBLEM_TYPES[errors.InvalidParameter]
    return problem_response(request.scope, problem_type, detail, parameters=parameters)


async def _http_exception(request: Request, exc: Exception) -> Response:
    if not isinstance(exc, HTTPException):
        raise exc
    problem_type = _STATUS_TYPES.get(exc.status_code)
    if problem_type is None:
        status = HTTPStatus(exc.status_code)
        problem_type = ProblemType(status, "about:blank", status.phrase)
    # Some statuses have headers of their own, such as 405's Allow.
    headers = dict(exc.headers) if exc.headers else None
    return problem_response(request.scope, problem_type, exc.detail, headers=headers)
