"""The photos in files and folders, and what else is there."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from service.errors import UnsupportedImageType
from service.images.decoding import IMAGE_MEDIA_TYPES, sniff

STDIN: Final = Path("/dev/stdin")
"""The photo that the argument ``-`` stands for."""

# Only the suffixes of formats that can be decoded count. Windows and Chrome write .jfif, cameras
# .mpo, which are JPEGs.
_SUFFIXES_BY_FORMAT: Final = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "HEIF": (".heic", ".heif", ".hif"),
    "AVIF": (".avif",),
}

SUFFIXES: Final = frozenset(
    suffix for name in IMAGE_MEDIA_TYPES for suffix in _SUFFIXES_BY_FORMAT.get(name, ())
)
"""Suffixes of photos in a folder; a file that is an argument itself may have any name."""

# Copies and thumbnails of Synology, QNAP, Windows and macOS, which are no photos of the user's.
_SYSTEM_FOLDERS: Final = frozenset(
    {"@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "__MACOSX"}
)
_SIGNATURE_BYTES: Final = 32
_KINDS_SHOWN: Final = 8


@dataclass(slots=True)
class Found:
    """The photos of some files and folders.

    ``photos``: ``{photo: path below its input}``; ``left_out``: the number of files that are no
    photos, by kind; ``unreadable``: what could not be read, and why.
    """

    photos: dict[Path, Path] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: dict[Path, str] = field(default_factory=dict)

    def describe_left_out(self) -> str:
        """What was left out, the most frequent first: ``3 .heic, 1 hidden``; or nothing."""
        kinds = self.left_out.most_common()
        shown = [f"{count} {kind}" for kind, count in kinds[:_KINDS_SHOWN]]
        others = sum(count for _, count in kinds[_KINDS_SHOWN:])
        return ", ".join([*shown, f"{others} others"] if others else shown)


def find_photos(inputs: Iterable[Path], out: Path | None = None) -> Found:
    """Find the photos in files and folders, without duplicates.

    In folders, hidden files and folders are left out, and so are files in ``out``. Links to folders
    are followed, but no folder is read twice. Files without a suffix are photos if they begin like
    one.
    """
    found = Found()
    folders = _Folders(found, out)
    seen: set[tuple[str, str]] = set()
    for argument in inputs:
        alone = [(argument, Path(argument.name))]
        photos = folders.photos(argument) if argument.is_dir() else alone
        for photo, relative in photos:
            # Two links to one file have two names and two outputs.
            place = folders.real(photo.parent), photo.name
            if place not in seen:
                seen.add(place)
                found.photos[photo] = relative
    return found


class RealFolders:
    """Resolves folders, each once: resolving thousands of files takes seconds."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def real(self, folder: Path) -> str:
        """The folder's path without links."""
        if folder not in self._known:
            self._known[folder] = os.path.realpath(folder)
        return self._known[folder]


class _Folders(RealFolders):
    """Walks through folders; counts in ``found`` what is left out."""

    def __init__(self, found: Found, out: Path | None) -> None:
        super().__init__()
        self._found = found
        self._out = None if out is None else os.path.realpath(out)
        self._visited: set[str] = set()

    def photos(self, root: Path) -> list[tuple[Path, Path]]:
        """The photos below a folder in the order of their names, with their paths below it."""
        found: list[Path] = []
        # Links come last, so that a folder in the tree keeps its own path.
        top = Path()
        waiting, links = deque([top]), deque[Path]()
        while waiting or links:
            below = (waiting or links).popleft()
            folder = root / below
            real = self.real(folder)
            if real in self._visited:
                continue
            self._visited.add(real)
            if self._is_output(real):
                if below == top:
                    self._found.left_out["output folder"] += 1
                continue
            try:
                with os.scandir(folder) as entries:
                    # Sorted, so that each run finds a folder by the same one of its links.
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        path = below / entry.name
                        if self._is_hidden(entry):
                            self._found.left_out["hidden"] += 1
                        elif _is_so(entry.is_dir):
                            (links if entry.is_symlink() else waiting).append(path)
                        elif (kind := _kind_of_other(entry)) is None:
                            found.append(path)
                        else:
                            self._found.left_out[kind] += 1
            except OSError as exc:
                self._found.unreadable[folder] = exc.strerror or str(exc)
        return [(root / path, path) for path in sorted(found)]

    def _is_output(self, real: str) -> bool:
        return self._out is not None and Path(real).is_relative_to(self._out)

    def _is_hidden(self, entry: os.DirEntry[str]) -> bool:
        return entry.name.startswith(".") or (entry.name in _SYSTEM_FOLDERS and entry.is_dir())


def _kind_of_other(entry: os.DirEntry[str]) -> str | None:
    """What kind of file an entry is, in a few words; None: a photo."""
    suffix = Path(entry.name).suffix.lower()
    # A link to nothing may have been a photo: it is reported when it is read.
    is_broken_link = entry.is_symlink() and not _is_so(Path(entry).exists)
    if not _is_so(entry.is_file) and not is_broken_link:
        return "special files"
    if suffix in SUFFIXES or (not suffix and _may_be_photo(Path(entry))):
        return None
    return suffix or "without suffix"


def _is_so(test: Callable[[], bool]) -> bool:
    """The result of a test of a file; False for links in circles or into unreadable folders."""
    try:
        return test()
    except OSError:
        return False


def _may_be_photo(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            sniff(file.read(_SIGNATURE_BYTES))
    except UnsupportedImageType:
        return False
    except OSError:  # reported when the photo is read
        return True
    return True
