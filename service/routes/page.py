"""``GET /``, the web page, and ``GET /docs``, the API description: no files of other hosts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fastapi import Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from service.http.routers import ServiceRouter

PAGE_POLICY: Final = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_POLICY: Final = (
    # Swagger UI uses inline styles and data URLs for icons.
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    # Browsers keep a file but revalidate it each time: an unchanged ETag gets 304.
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), geolocation=(), microphone=()",
}


class PageFiles(StaticFiles):
    """The files of a folder, each with an ETag and the security headers of a page."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """Return the file, or 304 if the browser has it."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        policy = DOCS_POLICY if Path(full_path).name == "docs.html" else PAGE_POLICY
        response.headers.update({**HEADERS, "Content-Security-Policy": policy})
        return response


_STATIC: Final = PageFiles(directory=Path(__file__).parent.parent / "static")
_SWAGGER_UI: Final = PageFiles(packages=[("fastapi_swagger", "resources")])

router = ServiceRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The web page."""
    return await _STATIC.get_response("index.html", request.scope)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs(request: Request) -> Response:
    """Swagger UI over ``/openapi.json``."""
    return await _STATIC.get_response("docs.html", request.scope)


@router.api_route("/static/swagger-ui/{path:path}", methods=["GET", "HEAD"])
async def swagger_ui(request: Request, path: str) -> Response:
    """A file of Swagger UI, from its package."""
    return await _SWAGGER_UI.get_response(path, request.scope)


@router.api_route("/static/{path:path}", methods=["GET", "HEAD"])
async def static(request: Request, path: str) -> Response:
    """A file of the two pages."""
    return await _STATIC.get_response(path, request.scope)
