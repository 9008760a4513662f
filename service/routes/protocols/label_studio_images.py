"""Fetches the image of a Label Studio task from one Label Studio.

Tasks name images by URL, and any client may send tasks. Therefore the service fetches only media
files of the Label Studio in the settings: it uses only path and query of a task's URL, the path
must be one of Label Studio's media paths, and redirects are not followed.

A personal access token opens nothing by itself: Label Studio exchanges it for an access token that
lasts minutes. Sources: https://labelstud.io/guide/access_tokens, and ``tokens/client_ext.py`` of
label-studio-sdk.
"""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import re
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from service.errors import BodyTooLarge, ImageUnavailable, InvalidParameter
from service.settings import Settings

MEDIA_PATHS: Final = ("/data/", "/storage-data/")
"""Label Studio's uploads, local files and its proxy for other storage."""

TIMEOUT_S: Final = 10.0
"""Longest time for one whole response from Label Studio."""

MAX_URL_BYTES: Final = 4096
"""Longest URL that a task may name."""

_CHUNK_BYTES: Final = 1 << 16
_REFRESH_PATH: Final = "/api/token/refresh/"
_MAX_TOKEN_BYTES: Final = 1 << 16
_JWT: Final = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
_PORTS: Final = {"http": 80, "https": 443}


@dataclass
class LabelStudioImages:
    """Fetches the images of one request's tasks, one after the other; blocking.

    ``url``: Label Studio's own (None: images must be ``data:`` URIs); ``token``: a legacy, a
    personal or an access token for it; ``max_bytes``: largest image file.
    """

    url: str | None
    token: str | None = field(repr=False)
    max_bytes: int
    _access: str | None = field(default=None, init=False, repr=False)

    @classmethod
    def configured(cls, settings: Settings) -> LabelStudioImages:
        """The reader for these settings."""
        token = settings.label_studio_token
        return cls(
            settings.label_studio_url,
            token.get_secret_value() if token is not None else None,
            settings.max_bytes,
        )

    def fetch(self, reference: bytes) -> bytes:
        """The bytes of the image file that a task names.

        Raises `InvalidParameter` for a URL that the service does not fetch, `ImageUnavailable` or
        `BodyTooLarge`.
        """
        if self.url is None:
            raise InvalidParameter(
                "an image must be a data: URI: FCN_LABEL_STUDIO_URL is not set, so the service "
                "cannot fetch images"
            )
        if len(reference) > MAX_URL_BYTES:
            raise InvalidParameter(f"an image's URL may have at most {MAX_URL_BYTES} bytes")
        path = _media_path(reference.decode(), self.url)
        personal = self.token is not None and _is_personal(self.token)
        if personal and self._access is None:
            self._renew(self.url)
        status, data = _request(self.url, "GET", path, self._headers(), self.max_bytes)
        if personal and status == http.HTTPStatus.UNAUTHORIZED:  # it has expired
            self._renew(self.url)
            status, data = _request(self.url, "GET", path, self._headers(), self.max_bytes)
        if status != http.HTTPStatus.OK:
            raise ImageUnavailable(f"Label Studio answered {status} for an image")
        return data

    def _renew(self, url: str) -> None:
        """Exchange the personal token for an access token. Raises `ImageUnavailable`."""
        status, data = _request(
            url,
            "POST",
            urlsplit(url).path.rstrip("/") + _REFRESH_PATH,
            {"Content-Type": "application/json"},
            _MAX_TOKEN_BYTES,
            json.dumps({"refresh": self.token}),
        )
        if status != http.HTTPStatus.OK:
            raise ImageUnavailable(
                f"Label Studio answered {status} for FCN_LABEL_STUDIO_TOKEN: if it has expired or "
                "was revoked, make a new one"
            )
        access = _members(data).get("access")
        if not isinstance(access, str) or not _JWT.fullmatch(access):
            raise ImageUnavailable("Label Studio sent no access token")
        self._access = access

    def _headers(self) -> dict[str, str]:
        token = self._access or self.token
        if token is None:
            return {}
        return {"Authorization": f"{'Bearer' if _JWT.fullmatch(token) else 'Token'} {token}"}


def _is_personal(token: str) -> bool:
    """Whether a token has to be exchanged. Legacy tokens are not JWTs."""
    if not _JWT.fullmatch(token):
        return False
    try:
        payload = base64.urlsafe_b64decode(token.split(".")[1] + "==")
    except binascii.Error:
        return False
    return _members(payload).get("token_type") == "refresh"


def _members(text: bytes) -> dict[str, Any]:
    """The members of a JSON object; none if it is something else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _request(
    url: str,
    method: str,
    path: str,
    headers: dict[str, str],
    max_bytes: int,
    body: str | None = None,
) -> tuple[int, bytes]:
    """The status and body of Label Studio's answer, the body only of status 200.

    Raises `ImageUnavailable` or `BodyTooLarge`.
    """
    base = urlsplit(url)
    host = base.hostname or ""
    connection = (
        http.client.HTTPSConnection(
            host, base.port, timeout=TIMEOUT_S, context=ssl.create_default_context()
        )
        if base.scheme == "https"
        else http.client.HTTPConnection(host, base.port, timeout=TIMEOUT_S)
    )
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        ok = response.status == http.HTTPStatus.OK
        return response.status, _body(response, max_bytes) if ok else b""
    except (OSError, http.client.HTTPException) as exc:
        raise ImageUnavailable("Label Studio did not send the image") from exc
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    until = time.monotonic() + TIMEOUT_S
    data = bytearray()
    while chunk := response.read1(_CHUNK_BYTES):
        data += chunk
        if len(data) > max_bytes:
            raise BodyTooLarge(f"an image may have at most {max_bytes} bytes")
        if time.monotonic() > until:
            raise ImageUnavailable("Label Studio sent the image too slowly")
    return bytes(data)


def _media_path(reference: str, url: str) -> str:
    """Path and query to request from the Label Studio at ``url``.

    ``reference``: a URL of that Label Studio, or a path on it. Raises `InvalidParameter`.
    """
    base = urlsplit(url)
    prefix = base.path.rstrip("/")
    try:
        parts = urlsplit(reference)
        origin = (parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme))
    except ValueError as exc:
        raise InvalidParameter("an image's URL is malformed") from exc
    ours = (base.scheme, base.hostname, base.port or _PORTS[base.scheme])
    if (parts.scheme or parts.netloc) and origin != ours:
        raise InvalidParameter(f"an image must be a file of {url} or a data: URI")
    path = parts.path
    if path.startswith(("upload/", "/upload/")):  # the form in which Label Studio stores uploads
        path = f"/data/{path.lstrip('/')}"
    path = path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
    plain = unquote(path)
    if not plain.startswith(MEDIA_PATHS) or {".", ".."} & set(plain.replace("\\", "/").split("/")):
        raise InvalidParameter(f"an image's path must begin with {' or '.join(MEDIA_PATHS)}")
    query = f"?{quote(parts.query, safe='%=&/:+,;@!~*()')}" if parts.query else ""
    return prefix + quote(path, safe="%/:+,;@!~*()=&") + query
