"""Zip archives that are sent while they are made."""

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
    """A zip archive in pieces: each file that is added gives the bytes to send.

    Files are stored as they are: what the service answers is compressed already.
    """

    def __init__(self) -> None:
        self._sink = _Sink()
        self._zip = zipfile.ZipFile(self._sink, "w", zipfile.ZIP_STORED)
        self._taken: set[str] = set()

    def add(self, name: str, content: bytes) -> bytes:
        """Add a file."""
        self._zip.writestr(zipfile.ZipInfo(name), content)
        return self._sink.drain()

    def close(self) -> bytes:
        """The archive's end."""
        self._zip.close()
        return self._sink.drain()

    def name(self, sent: str, suffix: str) -> str:
        """A name of its own for the answer to the file that was ``sent`` under this name.

        That is its stem, without folders and what file systems do not take; a name that is taken
        gets a number (``a-2.png``).
        """
        last = sent.replace("\\", "/").rstrip("/").rpartition("/")[2]
        stem = PurePosixPath(_UNSAFE.sub("_", last)).stem.strip(". ")[:_LONGEST_STEM] or "image"
        name, number = stem + suffix, 1
        # Some file systems do not tell upper from lower case.
        while name.lower() in self._taken:
            number += 1
            name = f"{stem}-{number}{suffix}"
        self._taken.add(name.lower())
        return name


class _Sink(io.RawIOBase):
    """What was written since it was last drained; `zipfile` goes back no further than that."""

    def __init__(self) -> None:
        self._drained = 0
        self._rest = io.BytesIO()

    def drain(self) -> bytes:
        """What there is, which is then forgotten."""
        content = self._rest.getvalue()
        self._drained += len(content)
        self._rest = io.BytesIO()
        return content

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        """Yes: sizes and checksums stand before the files, where streaming readers need them."""
        return True

    def tell(self) -> int:
        return self._drained + self._rest.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            offset -= self._drained
        return self._drained + self._rest.seek(offset, whence)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        return self._rest.write(data)
