"""Files are replaced whole or not at all."""

import os
from pathlib import Path

import pytest

from service.artefact.files import write_atomically


def test_the_file_appears_at_the_end(tmp_path: Path) -> None:
    """Until then the old one is there; missing folders are made, no other file is left."""
    path = tmp_path / "new" / "file"
    for content in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with write_atomically(path) as file:
            file.write(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_after_an_error_the_old_file_is_there(tmp_path: Path) -> None:
    """And the temporary one is not."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with write_atomically(path) as file:
            file.write(b"new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    """The temporary file's name does not grow with it."""
    path = tmp_path / ("n" * 255)
    with write_atomically(path) as file:
        file.write(b"content")
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_mode_is_that_of_any_new_file(tmp_path: Path, umask: int) -> None:
    """0o666 without the umask's bits."""
    before = os.umask(umask)
    try:
        with write_atomically(tmp_path / "file") as file:
            file.write(b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
