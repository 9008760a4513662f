"""Response headers of all protocols, and their OpenAPI."""

from __future__ import annotations

from typing import Final

from service.segmenter import Result

BINARY: Final = {"schema": {"type": "string", "format": "binary"}}
"""OpenAPI of a binary body."""

DOCUMENTED_HEADERS: Final = {
    "X-Model": {"schema": {"type": "string"}, "description": "name/version"},
    "X-Request-ID": {"schema": {"type": "string"}},
}
"""OpenAPI of the headers of every segmentation."""


def answer_headers(result: Result) -> dict[str, str]:
    """The model's name and version, and the milliseconds of each stage."""
    return {
        "X-Model": f"{result.model.name}/{result.model.version}",
        "Server-Timing": result.timings.header(),
    }
