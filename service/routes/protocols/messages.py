"""Request bodies of all endpoints with foreign protocols: reading, and their OpenAPI."""

from __future__ import annotations

from typing import Any, Final

from fastapi import Request

from service.http.uploads import read_body
from service.jobs.messages import Message
from service.settings import Settings

BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
"""OpenAPI's media type object for bytes."""


def request_body(
    message: type[Message], *, binary: bool = False, required: bool = True, description: str = ""
) -> dict[str, Any]:
    """``openapi_extra`` of an endpoint that parses its own body.

    ``binary``: the body may also be ``application/octet-stream``.
    """
    schema = {"$ref": f"#/components/schemas/{message.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if binary:
        content["application/octet-stream"] = BINARY
    body: dict[str, Any] = {"required": required, "content": content}
    if description:
        body["description"] = description
    return {"requestBody": body}


async def read_image_body(request: Request, settings: Settings, envelope_bytes: int) -> bytes:
    """A body that may carry an image in base64, in at most ``envelope_bytes`` of JSON.

    Raises as `read_body` does.
    """
    max_bytes = settings.max_bytes
    base64_bytes = -(-max_bytes // 3) * 4
    return await read_body(request, max_bytes, base64_bytes - max_bytes + envelope_bytes)
