"""Large arrays in stripes that fit into a core's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

STRIPE_BYTES: Final = 1 << 18
"""Bytes of a stripe, about. Work in a core's cache is several times faster than work on a whole
large photo, and takes little memory."""


def stripes(rows: int, row_bytes: int) -> Iterator[slice]:
    """Cut ``rows`` rows into consecutive slices of about `STRIPE_BYTES`, at least one row each.

    ``row_bytes``: the bytes that the work on one row takes.
    """
    step = max(1, STRIPE_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
