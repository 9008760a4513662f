"""Streamed zip archives, and the names of the files in them."""

import io
import zipfile
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.routes.archive import Archive


def test_the_pieces_are_an_archive() -> None:
    """Each file is sent when it is added; the joined pieces are a valid zip archive."""
    archive = Archive()
    contents = {"a.png": b"x" * 1000, "ä b.png": b"", "index.json": b"{}"}
    pieces = [archive.add(name, content) for name, content in contents.items()]
    assert len(pieces[0]) > 1000
    with zipfile.ZipFile(io.BytesIO(b"".join([*pieces, archive.close()]))) as read:
        assert read.testzip() is None
        assert {name: read.read(name) for name in read.namelist()} == contents
        # Readers that cannot seek need a stored file's size before its data.
        assert all(not entry.flag_bits & 0x08 for entry in read.infolist())


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        ("a.jpg", "a.png"),
        ("../../etc/passwd", "passwd.png"),
        ("C:\\photos\\b.final.JPG", "b.final.png"),
        ("", "image.png"),
        ("..", "image.png"),
        (".hidden", "hidden.png"),
        ('a<b>:"|?*\n.jpg', "a_b_______.png"),
        ("größe.webp", "größe.png"),
        ("x" * 500 + ".jpg", "x" * 120 + ".png"),
    ],
)
def test_names_are_stems(sent: str, name: str) -> None:
    """A name has no folders and no characters that file systems reject."""
    assert Archive().name(sent, ".png") == name


def test_names_that_are_taken_get_a_number() -> None:
    """A number makes names unique, ignoring case."""
    archive = Archive()
    sent = ["a.jpg", "a.png", "d/A.gif", "a-2.jpg"]
    assert [archive.name(one, ".png") for one in sent] == [
        *["a.png", "a-2.png", "A-3.png"],
        "a-2-2.png",
    ]


@given(st.lists(st.text(max_size=30), max_size=8))
def test_any_names(sent: list[str]) -> None:
    """Any names give single path components that are unique and valid in an archive."""
    archive = Archive()
    names = [archive.name(one, ".png") for one in sent]
    assert len({name.lower() for name in names}) == len(sent)
    for name in names:
        assert PurePosixPath(name).name == PureWindowsPath(name).name == name
        assert not name.startswith(".")
    pieces = [archive.add(name, b"") for name in names]
    with zipfile.ZipFile(io.BytesIO(b"".join([*pieces, archive.close()]))) as read:
        assert read.namelist() == names
