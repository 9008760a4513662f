"""Files written whole or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file whose content replaces ``path`` at the end, on disk before it does.

    Missing folders are created. If the block raises, ``path`` stays as it was. A kill leaves the
    old file or the new one, and at worst a hidden temporary file beside it.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the file's own name, which may be as long as names can be.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    # Not tempfile: its files are private to their owner, this one is readable like any new file.
    with temporary.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file; see `write_atomically`. Raises `OSError`."""
    with write_atomically(path) as file:
        file.write(content)


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in pieces. Raises `OSError` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
