"""Zip archives that are streamed while they are written."""

from __future__ import annotations

import io
import os
import re
import zipfile
from pathlib import PurePosixPath
from typing import Final

_UNSAFE: Final = re.compile(r'[\x00-\x1f\x7f<>:"|?*]')
_LONGEST_STEM: Final = 120


class Archive:
    """A zip archive in pieces: adding a file returns the bytes to send next.

    Files are stored without compression: images are compressed already.
    """

    def __init__(self) -> None:
        self._sink = _Sink()
        self._zip = zipfile.ZipFile(self._sink, "w", zipfile.ZIP_STORED)
        self._taken: set[str] = set()

    def add(self, name: str, content: bytes) -> bytes:
        """Add a file; returns the bytes to send."""
        self._zip.writestr(zipfile.ZipInfo(name), content)
        return self._sink.drain()

    def close(self) -> bytes:
        """End the archive; returns the last bytes to send."""
        self._zip.close()
        return self._sink.drain()

    def name(self, sent: str, suffix: str) -> str:
        """A unique name in the archive for the result of the file named ``sent``.

        The name is the file's stem without folders; ``_`` replaces characters that file systems
        reject. A name that is already taken gets a number (``a-2.png``).
        """
        last = sent.replace("\\", "/").rstrip("/").rpartition("/")[2]
        stem = PurePosixPath(_UNSAFE.sub("_", last)).stem.strip(". ")[:_LONGEST_STEM] or "image"
        name, number = stem + suffix, 1
        # Some file systems ignore case.
        while name.lower() in self._taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._taken.add(name.lower())
        return name


class _Sink(io.RawIOBase):
    """A file for `zipfile` to write to, which keeps only the bytes since the last `drain`.

    `zipfile` seeks back within one file's bytes only.
    """

    def __init__(self) -> None:
        self._drained = 0
        self._buffer = io.BytesIO()

    def drain(self) -> bytes:
        """Return the bytes in the buffer and empty it."""
        content = self._buffer.getvalue()
        self._drained += len(content)
        self._buffer = io.BytesIO()
        return content

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        # `zipfile` then writes sizes and checksums before the data, where streaming readers need
        # them.
        return True

    def tell(self) -> int:
        return self._drained + self._buffer.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            offset -= self._drained
        return self._drained + self._buffer.seek(offset, whence)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        return self._buffer.write(data)
