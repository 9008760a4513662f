"""Refuses what a web page of another origin sends (cross-site request forgery).

A browser lets any page post a form or a file to any address that it can reach, also to a service
on the user's own machine; it only hides the answer. Pages of this service and clients that are no
browsers are not affected. Source: RFC 6454, section 7; W3C Fetch Metadata, section 2; the algorithm
is that of Go's ``http.CrossOriginProtection``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import Scope

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})


def cross_site_error(scope: Scope, allowed_origins: Collection[str]) -> HTTPException | None:
    """The refusal (403) of a request from another origin's page; None if it is acceptable.

    Methods without effects are always acceptable. ``allowed_origins``: those of CORS, or ``*``.
    """
    if scope["method"] in _SAFE:
        return None
    headers = Headers(scope=scope)
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
    if "*" in allowed_origins or origin in allowed_origins:
        return None
    # The browser's own judgement; no page can set or change this header. Browsers send it over TLS
    # and to localhost.
    if site is not None:
        same = site in ("same-origin", "none")
    else:
        same = origin is None or _name(origin) in _own_names(headers)
    if same:
        return None
    return HTTPException(403, "a page of another origin sent this; the setting is cors_origins")


def _own_names(headers: Headers) -> set[str | None]:
    """The host names that the client may have used for this service, without ports.

    A proxy may have changed port and scheme, and also the Host. Of several proxies the first one
    got it from the client. A page of another origin cannot set X-Forwarded-Host without a
    preflight, which is refused.
    """
    forwarded, _, _ = headers.get("X-Forwarded-Host", "").partition(",")
    return {_name(f"//{host.strip()}") for host in (headers.get("Host", ""), forwarded)} - {None}


def _name(url: str) -> str | None:
    """The host name in a URL, in lower case; None if there is none, as in ``null``."""
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as a broken IPv6 address
        return None
