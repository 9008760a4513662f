"""Where a Label Studio task's image comes from: the request itself, or one Label Studio.

Tasks name images by URL, and whoever reaches this service may send tasks. So nothing is ever
fetched but media files of the Label Studio that the settings name: of a task's URL only path and
query are used, they must lie where Label Studio keeps media, and redirects are not followed.
"""

from __future__ import annotations

import http.client
import ssl
import time
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from service.errors import BodyTooLarge, ImageUnavailable, InvalidParameter
from service.routes.protocols.messages import DATA_URI, decode_data_uri
from service.settings import Settings

MEDIA_PATHS: Final = ("/data/", "/storage-data/")
"""Label Studio's uploads, local files and its proxy for other storage."""

TIMEOUT_S: Final = 10.0
"""Of one answer from Label Studio, whole."""

_CHUNK_BYTES: Final = 1 << 16
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True)
class LabelStudioImages:
    """Reads the images of tasks; blocking.

    ``url`` is Label Studio's own (None: images come in ``data:`` URIs alone), ``token`` an access
    token of it.
    """

    url: str | None
    token: str | None = field(repr=False)
    max_bytes: int

    @classmethod
    def configured(cls, settings: Settings) -> LabelStudioImages:
        """As the settings say."""
        token = settings.label_studio_token
        return cls(
            settings.label_studio_url,
            token.get_secret_value() if token is not None else None,
            settings.max_bytes,
        )

    def read(self, reference: str) -> bytes:
        """The image file that a task names.

        Raises `InvalidParameter` for a URL that is not fetched from, `ImageUnavailable`,
        `BodyTooLarge` or `MalformedRequest`.
        """
        if reference.startswith(DATA_URI):
            return decode_data_uri(reference, self.max_bytes)
        if self.url is None:
            raise InvalidParameter(
                "an image that is not a data: URI is fetched from Label Studio only, and "
                "FCN_LABEL_STUDIO_URL does not say where that is"
            )
        return self._fetch(self.url, _media_path(reference, self.url))

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
                raise ImageUnavailable(f"Label Studio answers {response.status} for an image")
            return self._body(response)
        except (OSError, http.client.HTTPException) as exc:
            raise ImageUnavailable("Label Studio does not send an image") from exc
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        if self.token is None:
            return {}
        # Label Studio's newer tokens are JWTs: three parts with dots between them.
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
                raise ImageUnavailable("Label Studio sends an image too slowly")
        return bytes(data)


def _media_path(reference: str, url: str) -> str:
    """Path and query of an image, as they are asked of Label Studio at ``url``.

    ``reference``: a URL of that Label Studio, or a path at it. Raises `InvalidParameter`.
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
        raise InvalidParameter(f"images are fetched from {url} only, or sent as data: URIs")
    path = parts.path
    if path.startswith(("upload/", "/upload/")):  # as Label Studio stores its uploads
        path = f"/data/{path.lstrip('/')}"
    path = path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path
    plain = unquote(path)
    if not plain.startswith(MEDIA_PATHS) or {".", ".."} & set(plain.replace("\\", "/").split("/")):
        raise InvalidParameter(f"images lie under {' or '.join(MEDIA_PATHS)} of Label Studio")
    query = f"?{quote(parts.query, safe='%=&/:+,;@!~*()')}" if parts.query else ""
    return prefix + quote(path, safe="%/:+,;@!~*()=&") + query
