"""Where outputs come from: the options and the photo of each, so that runs are never mixed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

Origin = Mapping[str, str | int | None]
"""What determines an output beside the photo: options by their flags' names, and the model."""


def compare(earlier: object, now: Origin) -> str:
    """How the options of an earlier run differ, in a few words; empty if they do not."""
    if not isinstance(earlier, dict):
        return "its options are unknown"
    return ", ".join(
        f"{name} was {earlier.get(name) or 'not given'}, is {now.get(name) or 'not given'}"
        for name in sorted({*earlier, *now})
        if earlier.get(name) != now.get(name)
    )


@dataclass(frozen=True, slots=True)
class PhotoId:
    """Which content a photo had: of its file (size, time of change in ns, inode), and its sha256.

    The file's numbers spare reading it; where they differ, the sha256 decides.
    """

    file: tuple[int, int, int]
    sha256: str

    @classmethod
    def of(cls, photo: Path, content: bytes) -> Self:
        """Describe a photo that was read. Raises `OSError` if it is gone."""
        return cls(_file_numbers(photo), hashlib.sha256(content).hexdigest())

    @classmethod
    def parse(cls, found: Mapping[str, Any] | None) -> Self | None:
        """Read `as_json`'s result; None if it is something else."""
        try:
            size, time_ns, inode = (found or {})["file"]
            return cls((size, time_ns, inode), (found or {})["sha256"])
        except (TypeError, KeyError, ValueError):
            return None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"file": list(self.file), "sha256": self.sha256}

    def fits(self, photo: Path, content: bytes | None) -> bool:
        """Whether ``photo`` is unchanged, by its file or, if that was read, by its content."""
        if content is not None:
            return self.sha256 == hashlib.sha256(content).hexdigest()
        try:
            return self.file == _file_numbers(photo)
        except OSError:
            return False


def _file_numbers(photo: Path) -> tuple[int, int, int]:
    stat = photo.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


class JsonLines:
    """A file of JSON objects, one a line, that is only appended to, by any number of threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def read(self) -> Iterator[dict[str, Any]]:
        """The objects. Lines that a kill or a full disk has cut are left out."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value

    def append(self, *values: Mapping[str, Any]) -> None:
        """Append objects, on disk when this returns. Raises `OSError`."""
        lines = b"".join(json.dumps(one, separators=(",", ":")).encode() + b"\n" for one in values)
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                # The last line may have been cut.
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    lines = lines if file.read(1) == b"\n" else b"\n" + lines
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Remove the file, if it exists."""
        self.path.unlink(missing_ok=True)
