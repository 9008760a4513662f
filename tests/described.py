"""Check that the service's answers match its OpenAPI description."""

from __future__ import annotations

from functools import cached_property

import httpx
import requests
import schemathesis
from fastapi import FastAPI
from schemathesis.specs.openapi.schemas import OpenApiSchema

from service.http.middleware import HEADERS
from service.settings import Settings
from tests.clients import Check

_DESCRIPTIONS: dict[object, _Description] = {}


def as_described(app: FastAPI, settings: Settings) -> Check:
    """A check for the answers of an app with these settings; descriptions are slow and reused.

    The check raises `AssertionError` for missing headers, and for a status, a media type or a body
    that is not described.
    """
    varying = (
        settings.api_keys_file is None,
        settings.rate_limit is None,
        settings.max_side,
    )
    return _DESCRIPTIONS.setdefault(varying, _Description(app)).check


class _Description:
    """The OpenAPI description of an app."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    @cached_property
    def _schema(self) -> OpenApiSchema:
        return schemathesis.openapi.from_dict(self._app.openapi())

    async def check(self, response: httpx.Response) -> None:
        """Raises `AssertionError`, or an error of Schemathesis for a body."""
        await response.aread()
        assert HEADERS.keys() <= {name.title() for name in response.headers}
        if response.status_code == 500:
            return  # Unexpected errors are not described.
        request = response.request
        operation = self._schema.find_operation_by_path(request.method, request.url.path)
        if operation is None or request.headers.get("Access-Control-Request-Method"):
            return
        described = self._schema.raw_schema["paths"][operation.path][request.method.lower()]
        answer = described["responses"].get(str(response.status_code))
        told = f"{operation.label}: {response.status_code}"
        assert answer is not None, f"{told} is not described"
        media_type = response.headers["Content-Type"].partition(";")[0]
        assert media_type in answer["content"], f"{told}: {media_type} is not described"
        # Lines of JSON are not a single document.
        if media_type != "application/x-ndjson":
            # Built by hand: httpx's response needs the request's body, which may be a stream.
            operation.validate_response(
                schemathesis.Response(
                    response.status_code,
                    headers={name: [value] for name, value in response.headers.items()},
                    content=response.content,
                    request=requests.Request(request.method, str(request.url)).prepare(),
                    elapsed=0.0,
                    verify=False,
                )
            )
