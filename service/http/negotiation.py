"""Proactive content negotiation by ``Accept``. Source: RFC 9110, section 12.5.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from service.errors import NotAcceptable

MediaTypeT = TypeVar("MediaTypeT", bound=str)


def negotiate(accept: str | None, available: Sequence[MediaTypeT]) -> MediaTypeT:
    """Choose the media type of ``available`` (the default first) that ``accept`` prefers.

    The most specific matching range gives a type its quality. Among equal qualities, the earliest
    in ``available`` wins. Without the header, any type is acceptable. Raises `NotAcceptable`.
    """
    if accept is None or not accept.strip():
        return available[0]
    ranges = _parse(accept)
    best = max(available, key=lambda media_type: _quality(media_type, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(
            f"Accept: {accept} allows none of {', '.join(available)}", tuple(available)
        )
    return best


def _parse(accept: str) -> list[tuple[str, float]]:
    """Media ranges with their qualities. Parameters other than ``q`` are ignored."""
    ranges = []
    for part in accept.split(","):
        media_range, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                try:
                    quality = min(max(float(value), 0.0), 1.0)
                except ValueError:
                    quality = 0.0
        ranges.append((media_range, quality))
    return ranges


def _quality(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    family = media_type.partition("/")[0] + "/*"
    for wanted in (media_type, family, "*/*"):
        found = [quality for media_range, quality in ranges if media_range == wanted]
        if found:
            return max(found)
    return 0.0
