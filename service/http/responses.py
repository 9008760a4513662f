"""Headers that answers of every protocol share."""

from __future__ import annotations

from typing import Any

from service.segmenter import Result


def answer_headers(result: Result[Any]) -> dict[str, str]:
    """Which model answered, and the milliseconds of each stage."""
    return {
        "X-Model": f"{result.model.name}/{result.model.version}",
        "Server-Timing": result.timings.header(),
    }
