"""Proactive content negotiation by ``Accept``. Source: RFC 9110, section 12.5.1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, TypeVar

from service.errors import NotAcceptable

MediaTypeT = TypeVar("MediaTypeT", bound=str)

# The value of a parameter, which may have commas and semicolons.
_QUOTED: Final = re.compile(r'"(?:[^"\\]|\\.)*"?')
_NUMBER: Final = re.compile(r"[0-9]{1,3}(\.[0-9]*)?|\.[0-9]+")
# Java's HttpURLConnection sends the first; the others are common names of registered types.
_ALIASES: Final = {"*": "*/*", "image/jpg": "image/jpeg", "image/x-png": "image/png"}


def negotiate(accept: Sequence[str], available: Sequence[MediaTypeT]) -> MediaTypeT:
    """Choose the media type of ``available`` (the default first) that ``accept`` prefers.

    ``accept``: the values of all its header lines. The most specific matching range gives a type
    its quality. Among equal qualities, the earliest in ``available`` wins. Without the header, any
    type is acceptable. Raises `NotAcceptable`.
    """
    joined = ", ".join(accept)
    ranges = _parse(joined)
    if not ranges:
        return available[0]
    best = max(available, key=lambda media_type: _quality(media_type, ranges))
    if _quality(best, ranges) <= 0:
        raise NotAcceptable(
            f"Accept: {joined} allows none of {', '.join(available)}", tuple(available)
        )
    return best


def _parse(accept: str) -> list[tuple[str, float]]:
    """Media ranges with their qualities. Parameters other than ``q`` are ignored."""
    ranges = []
    for part in _QUOTED.sub("", accept).lower().split(","):
        media_range, *parameters = (piece.strip() for piece in part.split(";"))
        quality = 1.0
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "q":
                number = value.strip()
                quality = min(float(number), 1.0) if _NUMBER.fullmatch(number) else 0.0
        if media_range:
            ranges.append((_ALIASES.get(media_range, media_range), quality))
    return ranges


def _quality(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    family = media_type.partition("/")[0] + "/*"
    for wanted in (media_type, family, "*/*"):
        found = [quality for media_range, quality in ranges if media_range == wanted]
        if found:
            return max(found)
    return 0.0
