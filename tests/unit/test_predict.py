"""The photos, the output paths and the records of ``fcn-segment predict``."""

import json
import os
from pathlib import Path

import pytest

from service.artefact.labels import VOC_LABELS
from service.cli.coco import CocoFile
from service.cli.outputs import RECORDS_NAME, OutputFiles, plan_outputs
from service.cli.photos import SUFFIXES, Found, find_photos
from service.cli.records import JsonLines, Origin, PhotoId
from service.errors import SettingsError
from service.images.decoding import IMAGE_MEDIA_TYPES

OPTIONS: Origin = {"--format": "mask", "model": "tiny 1 (0123)"}
JPEG_START = b"\xff\xd8\xff\xe0"


def touch(folder: Path, *names: str) -> None:
    """Create empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def planned(inputs: list[Path], out: Path, suffix: str = ".png") -> list[str]:
    """The planned outputs, relative to ``out``."""
    outputs = plan_outputs(find_photos(inputs, out).photos, out, suffix)
    return [str(path.relative_to(out)) for path in outputs.values()]


def names(found: Found) -> list[str]:
    """The paths of the photos below their inputs."""
    return [str(relative) for relative in found.photos.values()]


def test_folders_keep_their_structure(tmp_path: Path) -> None:
    """Photos keep their subfolders, in order; other files are left out and counted."""
    touch(tmp_path / "in", "b.JPG", "a/x.png", "a/b/y.webp", "notes.txt", "z.tiff", "i.xml")
    assert planned([tmp_path / "in"], tmp_path / "out") == [
        "a/b/y.png",
        "a/x.png",
        "b.png",
        "z.png",
    ]
    assert find_photos([tmp_path / "in"]).left_out == {".txt": 1, ".xml": 1}


def test_suffixes_of_every_format_that_is_decoded() -> None:
    """And only of those; JPEGs of Windows, Chrome and cameras with two lenses have others."""
    assert {".jpg", ".jfif", ".pjpeg", ".jif", ".mpo", ".png", ".webp", ".gif"} <= SUFFIXES
    assert (".heic" in SUFFIXES) == ("HEIF" in IMAGE_MEDIA_TYPES)


def test_a_file_without_suffix_is_a_photo_if_it_begins_like_one(tmp_path: Path) -> None:
    """Its first bytes decide."""
    (tmp_path / "IMG_1").write_bytes(JPEG_START)
    (tmp_path / "LICENSE").write_text("text")
    found = find_photos([tmp_path])
    assert names(found) == ["IMG_1"]
    assert found.left_out == {"without suffix": 1}


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    """What macOS and network storage leave beside photos; named ones are taken."""
    hidden = ["._a.jpg", ".thumbs/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/a.jpg"]
    touch(tmp_path, "a.jpg", *hidden)
    found = find_photos([tmp_path])
    assert names(found) == ["a.jpg"]
    assert found.describe_left_out() == "4 hidden"
    assert names(find_photos([tmp_path / ".thumbs", tmp_path / "._a.jpg"])) == ["a.jpg", "._a.jpg"]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    """Not in circles, and a folder in the tree keeps its own path."""
    touch(tmp_path, "in/z/b.jpg", "other/a.jpg")
    for link, target in [("d", "other"), ("e", "other"), ("a", "in/z"), ("z/up", "in")]:
        (tmp_path / "in" / link).symlink_to(tmp_path / target)
    assert names(find_photos([tmp_path / "in"])) == ["d/a.jpg", "z/b.jpg"]


def test_links_to_files_have_their_own_outputs(tmp_path: Path) -> None:
    """Data sets link many names to stored contents. A broken link is reported when it is read."""
    touch(tmp_path, "store/content", "in/c.jpg")
    for link in ("a.jpg", "b.jpg"):
        (tmp_path / "in" / link).symlink_to(tmp_path / "store/content")
    (tmp_path / "in/gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "in/self.jpg").symlink_to(tmp_path / "in/self.jpg")
    found = find_photos([tmp_path / "in"])
    assert names(found) == ["a.jpg", "b.jpg", "c.jpg", "gone.jpg", "self.jpg"]


def test_special_files_are_not_read(tmp_path: Path) -> None:
    """Reading a pipe would wait for ever."""
    os.mkfifo(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b")
    found = find_photos([tmp_path])
    assert (names(found), found.left_out) == ([], {"special files": 2})


def test_only_the_most_frequent_kinds_are_listed() -> None:
    """The rest is a number."""
    found = Found()
    found.left_out.update({f".{number}": 20 - number for number in range(10)})
    assert found.describe_left_out().endswith("13 .7, 23 others")


def test_a_file_argument_may_have_any_name(tmp_path: Path) -> None:
    """It may even be missing: that is an error when it is read."""
    assert planned([tmp_path / "photo"], tmp_path / "out", ".json") == ["photo.json"]


def test_stems_that_collide_keep_their_suffix(tmp_path: Path) -> None:
    """They get a number where that is not enough; nothing is overwritten."""
    touch(tmp_path, "1/a.jpg", "2/a.jpg", "2/a.png", "2/b.png", "3/a.jpg")
    inputs = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
    outputs = ["a.jpg.png", "a-2.jpg.png", "a.png.png", "b.png", "a-3.jpg.png"]
    assert planned(inputs, tmp_path / "out") == outputs


def test_a_photo_given_twice_is_planned_once(tmp_path: Path) -> None:
    """A photo given as a file and by its folder has one output."""
    touch(tmp_path, "in/a.jpg")
    assert planned([tmp_path / "in" / "a.jpg", tmp_path / "in"], tmp_path / "out") == ["a.png"]


def test_earlier_outputs_are_not_photos(tmp_path: Path) -> None:
    """An output folder inside the input folder is ignored; as the input folder it is counted."""
    touch(tmp_path, "a.jpg", "out/a.png")
    assert planned([tmp_path], tmp_path / "out") == ["a.png"]
    assert find_photos([tmp_path], tmp_path).describe_left_out() == "1 output folder"


def test_a_photo_is_never_overwritten(tmp_path: Path) -> None:
    """An output with the path of a photo is an error, also by way of a link."""
    touch(tmp_path, "in/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    photos = find_photos([tmp_path / "in/a.png"]).photos
    for out in ("in", "link"):
        with pytest.raises(SettingsError, match="would overwrite the photo"):
            plan_outputs(photos, tmp_path / out, ".png")


def test_planning_compares_no_photo_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of 17,125 photos starts at once: each path is compared a few times only."""
    compared = 0
    equal = Path.__eq__

    def counted(self: Path, other: object) -> bool:
        nonlocal compared
        compared += 1
        return equal(self, other)

    photos = {Path(f"/in/{number}/a.jpg"): Path("a.jpg") for number in range(300)}
    photos |= {Path(f"/in/{number}.jpg"): Path(f"{number}.jpg") for number in range(300)}
    monkeypatch.setattr(Path, "__eq__", counted)
    assert len(set(plan_outputs(photos, Path("/out"), ".png").values())) == 600
    assert len(CocoFile.plan(photos, Path("/out"), overwrite=False).names) == 600
    assert compared < 20 * len(photos)


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    """And the next one is not appended to it."""
    lines = JsonLines(tmp_path / "new" / "lines")
    assert list(lines.read()) == []
    lines.append({"a": 1}, {"a": 2})
    lines.path.write_bytes(lines.path.read_bytes() + b'{"a": "\xc3')
    lines.append({"a": 3})
    assert list(lines.read()) == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photo's file."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"first")
    return path


def written(photo: Path, out: Path, options: Origin = OPTIONS) -> OutputFiles:
    """The outputs of a run that has written the photo's."""
    outputs = OutputFiles({photo: out / "a.png"}, out)
    outputs.resume(options, VOC_LABELS, None)
    outputs.add(photo, PhotoId.of(photo, photo.read_bytes()), b"mask")
    return outputs


def resumed(photo: Path, out: Path, options: Origin = OPTIONS) -> OutputFiles:
    """The outputs that a later run finds."""
    outputs = OutputFiles({photo: out / "a.png"}, out)
    outputs.resume(options, VOC_LABELS, None)
    return outputs


def test_an_output_belongs_to_its_photo(photo: Path, tmp_path: Path) -> None:
    """Another photo of the same name is not done; a moved or copied one is, by its content."""
    out = tmp_path / "out"
    written(photo, out)
    assert resumed(photo, out).has(photo)
    os.utime(photo, (1, 1))
    again = resumed(photo, out)
    assert not again.has(photo)
    assert again.has(photo, b"first")
    assert not again.has(photo, b"other")


def test_an_output_of_other_options_is_refused(photo: Path, tmp_path: Path) -> None:
    """The error names the difference."""
    out = tmp_path / "out"
    written(photo, out)
    with pytest.raises(SettingsError, match="--classes was not given, is cat"):
        resumed(photo, out, {**OPTIONS, "--classes": "cat"})
    with pytest.raises(SettingsError, match=r"--format was mask, is overlay"):
        resumed(photo, out, {**OPTIONS, "--format": "overlay"})


def test_an_output_without_a_record_is_refused(photo: Path, tmp_path: Path) -> None:
    """It may be anything."""
    touch(tmp_path, "out/a.png")
    with pytest.raises(SettingsError, match="options are unknown"):
        resumed(photo, tmp_path / "out")


@pytest.mark.parametrize("step", ["append", "unlink"])
def test_a_kill_never_leaves_an_output_with_anothers_record(
    photo: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step it interrupts, the photo is redone or refused by a later run."""
    out = tmp_path / "out"
    written(photo, out)
    photo.write_bytes(b"second")
    interrupted = OutputFiles({photo: out / "a.png"}, out, overwrite=True)
    interrupted.resume(OPTIONS, VOC_LABELS, None)
    photo_id = PhotoId.of(photo, b"second")

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines if step == "append" else Path, step, kill)
        with pytest.raises(KeyboardInterrupt):
            interrupted.add(photo, photo_id, b"new mask")
    assert not resumed(photo, out).has(photo, b"second")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """The list and the records have the names' own bytes."""
    photo = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    photo.write_bytes(b"photo")
    photos = find_photos([tmp_path]).photos
    out = tmp_path / "out"
    outputs = OutputFiles.voc(photos, out, overwrite=False)
    outputs.resume(OPTIONS, VOC_LABELS, None)
    outputs.add(photo, PhotoId.of(photo, b"photo"), b"mask")
    outputs.finish()
    assert (out / "ImageSets/Segmentation/pred.txt").read_bytes() == b"caf\xe9\n"
    again = OutputFiles.voc(photos, out, overwrite=False)
    again.resume(OPTIONS, VOC_LABELS, None)
    assert again.has(photo)
    (record,) = (json.loads(line) for line in (out / RECORDS_NAME).read_text().splitlines())
    assert record["output"] == "SegmentationClass/caf\udce9.png"
