"""The output paths of ``fcn-segment predict``."""

from pathlib import Path

import pytest

from service.cli.outputs import plan_outputs
from service.errors import SettingsError


def touch(folder: Path, *names: str) -> None:
    """Create empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def planned(inputs: list[Path], out: Path, suffix: str = ".png") -> list[str]:
    """The planned outputs, relative to ``out``."""
    return [str(path.relative_to(out)) for path in plan_outputs(inputs, out, suffix).values()]


def test_folders_keep_their_structure(tmp_path: Path) -> None:
    """Photos keep their subfolders, in order; other files are ignored."""
    touch(tmp_path / "in", "b.JPG", "a/x.png", "a/b/y.webp", "notes.txt", "z.tiff")
    assert planned([tmp_path / "in"], tmp_path / "out") == [
        "a/b/y.png",
        "a/x.png",
        "b.png",
        "z.png",
    ]


def test_a_file_argument_may_have_any_name(tmp_path: Path) -> None:
    """It may even be missing: that is an error when it is read."""
    assert planned([tmp_path / "photo"], tmp_path / "out", ".json") == ["photo.json"]


def test_stems_that_collide_keep_their_suffix(tmp_path: Path) -> None:
    """They get a number where that is not enough; nothing is overwritten."""
    touch(tmp_path, "1/a.jpg", "2/a.jpg", "2/a.png", "2/b.png")
    inputs = [tmp_path / "1", tmp_path / "2"]
    assert planned(inputs, tmp_path / "out") == ["a.jpg.png", "a-2.jpg.png", "a.png.png", "b.png"]


def test_a_photo_given_twice_is_planned_once(tmp_path: Path) -> None:
    """A photo given as a file and by its folder has one output."""
    touch(tmp_path, "in/a.jpg")
    assert planned([tmp_path / "in" / "a.jpg", tmp_path / "in"], tmp_path / "out") == ["a.png"]


def test_earlier_outputs_are_not_photos(tmp_path: Path) -> None:
    """An output folder inside the input folder is ignored."""
    touch(tmp_path, "a.jpg", "out/a.png")
    assert planned([tmp_path], tmp_path / "out") == ["a.png"]


def test_a_photo_is_never_overwritten(tmp_path: Path) -> None:
    """An output with the path of a photo is an error."""
    touch(tmp_path, "a.png")
    with pytest.raises(SettingsError, match="would overwrite the photo"):
        plan_outputs([tmp_path / "a.png"], tmp_path, ".png")
