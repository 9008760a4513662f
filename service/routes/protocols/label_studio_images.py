"""Fetches the image of a Label Studio task from one Label Studio.

Tasks name images by URL, and any client may send tasks. Therefore the service fetches only media
files of the Label Studio in the settings: it uses only path and query of a task's URL, the path
must be one of Label Studio's media paths, and redirects are not followed.
"""

from __future__ import annotations

import http.client
import ssl
import time
from dataclasses import dataclass, field
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

_CHUNK_BYTES: Final = 1 << 16
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True)
class LabelStudioImages:
    """Fetches the images of tasks; blocking.

    ``url``: Label Studio's own (None: images must be ``data:`` URIs); ``token``: an access token
    for it; ``max_bytes``: largest image file.
    """

    url: str | None
    token: str | None = field(repr=False)
    max_bytes: int

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
        return self._fetch(self.url, _media_path(reference.decode(), self.url))

    def _fetch(self, url: str, path: str) -> bytes:
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
            connection.request("GET", path, headers=self._headers())
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise ImageUnavailable(f"Label Studio answered {response.status} for an image")
            return self._body(response)
        except (OSError, http.client.HTTPException) as exc:
            raise ImageUnavailable("Label Studio did not send the image") from exc
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        if self.token is None:
            return {}
        # Newer tokens of Label Studio are JWTs: three parts separated by dots.
        scheme = "Bearer" if self.token.count(".") == 2 else "Token"
        return {"Authorization": f"{scheme} {self.token}"}

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
