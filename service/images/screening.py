"""Limit what Pillow may do with one file that has passed `service.images.headers`."""

from __future__ import annotations

import io
from typing import Final

from service.errors import TooExpensive

MAX_READS: Final = 1 << 18
"""Largest number of reads that Pillow may need for one file.

A file of 20 MiB in chunks of 1 KiB needs about a third of that.
"""


class MeteredFile(io.BytesIO):
    """A file in memory that limits its reads to `MAX_READS`.

    Reads beyond it raise `TooExpensive`, which none of Pillow's readers catches.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like `io.BytesIO`. Raises `TooExpensive` beyond the limit."""
        self._reads += 1
        if self._reads > MAX_READS:
            raise TooExpensive(f"reading the image takes more than {MAX_READS} steps")
        return super().read(size)
