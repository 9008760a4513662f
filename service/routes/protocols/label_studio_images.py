"""Fetches the image of a Label Studio task from one Label Studio.

Tasks name images by URL, and any client may send tasks. Therefore the service fetches only media
files of the Label Studio in the settings: it uses only path and query of a task's URL, the path
must be one of Label Studio's media paths, and redirects are not followed.
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import ssl
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from service.errors import BodyTooLarge, ImageUnavailable, InvalidParameter
from service.settings import Settings

MEDIA_PATHS: Final = ("/data/", "/storage-data/")
"""Label Studio's uploads, local files and its proxy for other storage."""

TIMEOUT_S: Final = 10.0
"""Longest time for one whole response from Label Studio."""

MAX_URL_BYTES: Final = 4096
"""Longest URL that a task may name."""

REFRESH_PATH: Final = "/api/token/refresh"

_JWT_DOTS: Final = 2
_TOKEN: Final = re.compile(r"[\w.~+/=-]{1,8192}", re.ASCII)
_CHUNK_BYTES: Final = 1 << 16
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True)
class LabelStudioImages:
    """Fetches the images of tasks; blocking.

    ``url``: Label Studio's own (None: images must be ``data:`` URIs); ``token``: for it, of
    any of its kinds; ``max_bytes``: largest image file. A personal access token, Label Studio's
    default kind, is a refresh token. The access token that it is exchanged for is kept until Label
    Studio refuses it. Source: https://labelstud.io/guide/access_tokens.
    """

    url: str | None
    token: str | None = field(repr=False)
    max_bytes: int
    # The access token, none before the first exchange.
    _access: list[str] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def configured(cls, settings: Settings) -> LabelStudioImages:
        """The reader for these settings."""
        token = settings.label_studio_token
        return _remembered(
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
        return self._fetch(self.url, _media_path(reference.decode(), self.url))

    def _fetch(self, url: str, path: str) -> bytes:
        status, content = self._ask(url, "GET", path, self._authorization(url))
        if status == http.HTTPStatus.UNAUTHORIZED and self._access:
            self._access.clear()  # such tokens are good for minutes
            status, content = self._ask(url, "GET", path, self._authorization(url))
        if status != http.HTTPStatus.OK:
            raise ImageUnavailable(f"Label Studio answered {status} for an image")
        return content

    def _authorization(self, url: str) -> dict[str, str]:
        """The header for a request; a personal token is first exchanged for an access token."""
        if self.token is None:
            return {}
        if self.token.count(".") != _JWT_DOTS:
            return {"Authorization": f"Token {self.token}"}
        if not _opens_nothing(self.token):
            return {"Authorization": f"Bearer {self.token}"}
        # Requests fetch in threads of their own; two exchanges at once do no harm.
        access = next(iter(self._access), None)
        if access is None:
            access = self._exchange(url, self.token)
            self._access[:] = [access]
        return {"Authorization": f"Bearer {access}"}

    def _exchange(self, url: str, token: str) -> str:
        path = urlsplit(url).path.rstrip("/") + REFRESH_PATH
        headers = {"Content-Type": "application/json"}
        status, answer = self._ask(url, "POST", path, headers, json.dumps({"refresh": token}))
        if status != http.HTTPStatus.OK:
            raise ImageUnavailable(
                f"Label Studio answered {status} to FCN_LABEL_STUDIO_TOKEN, a personal access "
                "token: create a new one in its Account & Settings"
            )
        try:
            access = json.loads(answer)["access"]
        except (ValueError, TypeError, KeyError) as exc:
            raise ImageUnavailable("Label Studio sent no access token") from exc
        if not isinstance(access, str) or not _TOKEN.fullmatch(access):
            raise ImageUnavailable("Label Studio sent no access token")
        return access

    def _ask(
        self, url: str, method: str, path: str, headers: dict[str, str], body: str | None = None
    ) -> tuple[int, bytes]:
        """The status and the body of an answer; the body is read for 200 alone."""
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
            found = response.status == http.HTTPStatus.OK
            return response.status, self._body(response) if found else b""
        except (OSError, http.client.HTTPException) as exc:
            raise ImageUnavailable("Label Studio did not send the image") from exc
        finally:
            connection.close()

    def _body(self, response: http.client.HTTPResponse) -> bytes:
        until = time.monotonic() + TIMEOUT_S
        data = bytearray()
        while chunk := response.read1(_CHUNK_BYTES):
            data += chunk
            if len(data) > self.max_bytes:
                raise BodyTooLarge(f"an image may have at most {self.max_bytes} bytes")
            if time.monotonic() > until:
                raise ImageUnavailable("Label Studio sent the image too slowly")
        return bytes(data)


@lru_cache(maxsize=4)
def _remembered(url: str | None, token: str | None, max_bytes: int) -> LabelStudioImages:
    """The same reader for the same settings, so that its access token is used again."""
    return LabelStudioImages(url, token, max_bytes)


def _opens_nothing(token: str) -> bool:
    """Whether a JWT is a refresh token: only the access token that it is exchanged for opens."""
    payload = token.split(".")[1]
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except ValueError:
        return False
    return isinstance(claims, dict) and claims.get("token_type") == "refresh"


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
