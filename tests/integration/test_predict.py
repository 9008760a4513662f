"""``fcn-segment predict`` on files and folders."""

import contextlib
import errno
import io
import json
import os
import pty
import re
import socket
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pycocotools.coco import COCO  # type: ignore[import-untyped]
from skimage import data

from service.artefact import voc
from service.cli.coco import CocoFile
from service.cli.main import main
from service.cli.outputs import RECORDS_NAME
from service.client import AsyncClient, Retries, ServiceUnreachable
from tests.artefacts import build_artefact, encode, two_class_photo
from tests.clients import Server, command_line, environment

PHOTO = encode(two_class_photo())
JPEG = encode(data.astronaut(), "JPEG")  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def tiny_model(tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the tiny artefact in every command."""
    monkeypatch.setenv("FCN_MODEL", str(tiny_artefact))
    monkeypatch.setenv("FCN_THREADS", "1")


def visible(folder: Path) -> list[str]:
    """The names in a folder that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_masks_of_a_file_and_a_folder(tmp_path: Path) -> None:
    """Masks are palette PNGs named after the stems, in the folder's structure; status 0."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.png").write_bytes(PHOTO)
    (tmp_path / "single.photo").write_bytes(PHOTO)
    out = tmp_path / "out"
    assert main(["predict", f"{tmp_path}/in", f"{tmp_path}/single.photo", "--out", str(out)]) == 0
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == [RECORDS_NAME, "deep/a.png", "single.png"]
    with Image.open(out / "single.png") as image:
        assert (image.mode, image.size) == ("P", (96, 64))
        assert np.asarray(image)[30, 80] == 15
    assert (out / "single.png").stat().st_mode & 0o777 == 0o644


def test_one_bad_file_does_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each bad file is one line on stderr, and the exit status is 1."""
    (tmp_path / "a.jpg").write_bytes(b"hello")
    (tmp_path / "b.png").write_bytes(PHOTO)
    (tmp_path / "c.png").write_bytes(PHOTO[:60])
    (tmp_path / "d.png").touch()
    (tmp_path / "notes.txt").touch()
    missing = tmp_path / "missing.png"
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path), str(missing), "--out", str(out)]) == 1
    assert visible(out) == ["b.png"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fcn-segment: 5 photos; left out: 1 .txt"
    for name, reason in [
        ("a.jpg", "not an image of an allowed type"),
        ("c.png", "broken, truncated"),
        ("d.png", "the file is empty"),
        ("missing.png", "No such file"),
    ]:
        assert any(name in line and reason in line for line in lines)
    summary = (
        r"fcn-segment: 5 photos: 1 segmented, 4 failed, in \d+\.\d s; photos with .*person 1.*"
    )
    assert re.fullmatch(summary, lines[-1])
    assert len(lines) == 6


def test_other_formats(tmp_path: Path) -> None:
    """Overlay, cut-out and JSON are formats; `--view` is an alias of `--format`."""
    photo = tmp_path / "a.png"
    photo.write_bytes(PHOTO)
    for name, mode in (("overlay", "RGB"), ("cutout", "RGBA")):
        out = tmp_path / name
        assert main(["predict", str(photo), "--out", str(out), "--format", name]) == 0
        with Image.open(out / "a.png") as image:
            assert (image.mode, image.size) == (mode, (96, 64))
    out = tmp_path / "json"
    command = ["predict", str(photo), "--out", str(out), "--view", "json"]
    assert main([*command, "--mask", "polygons", "--classes", "person"]) == 0
    (found,) = json.loads((out / "a.json").read_text())["classes"]
    assert found["name"] == "person"
    assert found["polygons"]
    assert visible(out) == ["a.json"]


def test_existing_outputs_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the same photos and options; only --overwrite repeats them."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(PHOTO)
    out = tmp_path / "out"
    command = ["predict", str(tmp_path), "--out", str(out)]
    assert main(command) == 0
    (out / "b.png").unlink()
    kept = (out / "a.png").stat().st_ino
    assert main(command) == 0
    again = "done already (--overwrite repeats them)"
    assert f"2 photos: 1 segmented, 1 {again}, in" in capsys.readouterr().err
    assert main(command) == 0
    assert f"2 photos: 0 segmented, 2 {again}, in" in capsys.readouterr().err
    assert (out / "a.png").stat().st_ino == kept
    assert main([*command, "--classes", "unicorn"]) == 2
    assert "--classes: no class 'unicorn'" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--jobs", "8"]) == 0
    assert "2 photos: 2 segmented, in" in capsys.readouterr().err
    assert (out / "a.png").stat().st_ino != kept


def test_a_replaced_photo_is_redone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every format; a photo that was only touched is not."""
    photo = tmp_path / "a.png"
    for name in ("mask", "coco"):
        photo.write_bytes(PHOTO)
        command = ["predict", str(photo), "--out", str(tmp_path / name), "--format", name]
        assert main(command) == 0
        os.utime(photo, (1, 1))
        assert main(command) == 0
        assert "0 segmented, 1 done already" in capsys.readouterr().err
        photo.write_bytes(JPEG)
        os.utime(photo, (1, 1))
        assert main(command) == 0
        assert "1 photo: 1 segmented, in" in capsys.readouterr().err
    with Image.open(tmp_path / "mask" / "a.png") as mask:
        assert mask.size == (512, 512)
    (image,) = json.loads((tmp_path / "coco" / "annotations.json").read_text())["images"]
    assert (image["width"], image["height"]) == (512, 512)


@pytest.mark.parametrize(
    ("first", "then", "difference"),
    [
        ("--format mask", "--format overlay", "--format was mask, is overlay"),
        ("--format coco --classes person", "--format coco", "--classes was person, is not given"),
        ("--format coco", "--format coco --mask rle", "--mask was polygons, is rle"),
        ("--format voc", "--format voc --max-side 64", "--max-side was not given, is 64"),
    ],
)
def test_outputs_of_other_options_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, then: str, difference: str
) -> None:
    """They are left as they are; --overwrite replaces them."""
    photo, out = tmp_path / "a.png", tmp_path / "out"
    photo.write_bytes(PHOTO)
    command = ["predict", str(photo), "--out", str(out)]
    assert main([*command, *first.split()]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*command, *then.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert difference in lines[0]
    assert before == {path: path.read_bytes() for path in before}
    assert main([*command, *then.split(), "--overwrite"]) == 0
    assert main([*command, *then.split()]) == 0
    assert "1 done already" in capsys.readouterr().err


def test_outputs_of_another_model_are_refused(
    tmp_path: Path, tiny_artefact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Name, version and file count. A model that cannot be opened is an error, too."""
    photo = tmp_path / "a.png"
    photo.write_bytes(PHOTO)
    command = ["predict", str(photo), "--out", str(tmp_path / "out"), "--model"]
    assert main([*command, str(tiny_artefact)]) == 0
    other = build_artefact(tmp_path / "other", version="2")
    assert main([*command, str(other)]) == 2
    assert "model was tiny" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "nothing")]) == 1


@pytest.mark.parametrize("name", ["mask", "json", "voc", "coco"])
def test_outputs_are_whole_or_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A full disk ends the run with one line; the same command then resumes."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(PHOTO)
    out = tmp_path / "out"
    command = ["predict", str(tmp_path), "--out", str(out), "--format", name, "--jobs", "1"]

    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main(command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert not [*out.rglob("*.png"), *out.rglob("*.json"), *out.rglob("*.tmp")]
    assert main(command) == 0
    assert "3 photos: 3 segmented" in capsys.readouterr().err


def test_a_folder_without_photos_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what is there instead."""
    for name in ("a.psd", "b.PSD", ".hidden.jpg"):
        (tmp_path / name).touch()
    assert main(["predict", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"fcn-segment: {tmp_path}: no photo, only 2 .psd, 1 hidden\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos may be missing."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.png").write_bytes(PHOTO)
    scandir = os.scandir

    def refuse(folder: Path) -> Any:  # noqa: ANN401 - as the original's
        if folder.name == "deep":
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert main(["predict", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'in' / 'deep'}: Permission denied" in capsys.readouterr().err
    assert (tmp_path / "out" / "a.png").exists()


def test_stdin_and_stdout(tmp_path: Path) -> None:
    """A photo comes in by a pipe, and its mask goes out by one; stdout has nothing else."""
    photo = tmp_path / "a.png"
    photo.write_bytes(PHOTO)

    def piped(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
        command = command_line("predict", *arguments)
        return subprocess.run(
            command, env=environment(), input=PHOTO, capture_output=True, timeout=60, check=False
        )

    done = piped("-", "--out", "-")
    assert done.returncode == 0, done.stderr
    with Image.open(io.BytesIO(done.stdout)) as mask:
        assert (mask.mode, mask.size) == ("P", (96, 64))
    assert b"1 photo: 1 segmented" in done.stderr
    assert piped("-", "--out", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "stdin.png").read_bytes() == done.stdout
    for arguments in (["-", str(photo), "--out", "-"], ["-", "--out", "-", "--format", "coco"]):
        refused = piped(*arguments)
        assert (refused.returncode, refused.stdout) == (2, b"")
        assert b"--out -: stdout takes one photo" in refused.stderr


def test_vocs_layout(tmp_path: Path) -> None:
    """Masks are in SegmentationClass; the list has the names of all photos that have a mask."""
    photos = tmp_path / "JPEGImages"
    (photos / "deep").mkdir(parents=True)
    (photos / "2007_000001.jpg").write_bytes(PHOTO)
    (photos / "deep" / "b.png").write_bytes(PHOTO)
    (photos / "bad.jpg").write_bytes(b"hello")
    command = ["predict", str(photos), "--out", str(tmp_path), "--format", "voc"]
    assert main(command) == 1
    names = (tmp_path / "ImageSets" / "Segmentation" / "pred.txt").read_text().splitlines()
    assert names == ["2007_000001", "deep/b"]
    for name in names:
        with Image.open(tmp_path / "SegmentationClass" / f"{name}.png") as image:
            assert image.getpalette() == voc.FULL_PALETTE.ravel().tolist()
            assert np.asarray(image)[30, 80] == 15
    (photos / "bad.jpg").write_bytes(PHOTO)
    assert main(command) == 0
    names = (tmp_path / "ImageSets" / "Segmentation" / "pred.txt").read_text().splitlines()
    assert names == ["2007_000001", "bad", "deep/b"]


def masks_of(out: Path, file_name: str) -> tuple[dict[int, npt.NDArray[np.bool_]], COCO]:
    """The masks of one photo in a COCO file, by category, decoded by pycocotools."""
    with contextlib.redirect_stdout(None):
        dataset = COCO(str(out / "annotations.json"))
    (image,) = (one for one in dataset.dataset["images"] if one["file_name"] == file_name)
    found = dataset.loadAnns(dataset.getAnnIds(imgIds=[image["id"]]))
    return {one["category_id"]: dataset.annToMask(one) == 1 for one in found}, dataset


@pytest.mark.parametrize(("mask", "least_iou"), [("polygons", 0.98), ("rle", 1.0)])
def test_a_coco_file(tmp_path: Path, mask: str, least_iou: float) -> None:
    """Each class of each photo has one annotation, which pycocotools decodes to its mask."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    (photos / "deep").mkdir(parents=True)
    (photos / "a.jpg").write_bytes(JPEG)
    (photos / "deep" / "a.jpg").write_bytes(PHOTO)
    command = ["predict", str(photos), "--out", str(out)]
    assert main([*command, "--format", "mask"]) == 0
    assert main([*command, "--format", "coco", "--mask", mask]) == 0
    for name in ("a.jpg", "deep/a.jpg"):
        found, dataset = masks_of(out, name)
        with Image.open((out / name).with_suffix(".png")) as image:
            expected = np.asarray(image)
        assert set(found) == set(np.unique(expected).tolist()) - {0}
        for class_id, filled in found.items():
            region = expected == class_id
            assert (filled & region).sum() / (filled | region).sum() >= least_iou
    assert [one["id"] for one in dataset.dataset["categories"]] == list(range(1, 21))
    for one in dataset.dataset["annotations"]:
        assert one["iscrowd"] == (mask == "rle")
        assert one["area"] > 0
        assert 0 < one["score"] <= 1
    assert not (out / "annotations.jsonl.part").exists()


def test_a_coco_file_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run resumes after a killed one and after a complete one, but not with --overwrite."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (photos / name).write_bytes(PHOTO)
    command = ["predict", str(photos), "--out", str(out), "--format", "coco", "--jobs", "1"]

    def killed(_: CocoFile) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CocoFile, "finish", killed)
        assert main(command) == 130
    assert [path.name for path in out.iterdir()] == ["annotations.jsonl.part"]
    lines = (out / "annotations.jsonl.part").read_text().splitlines(keepends=True)
    assert len(lines) == 4  # the options, and a photo each
    # The second photo is missing, and the third photo's line is incomplete.
    (out / "annotations.jsonl.part").write_text(lines[0] + lines[1] + lines[3][:50])
    assert main(command) == 0
    assert "3 photos: 2 segmented, 1 done already" in capsys.readouterr().err
    whole = json.loads((out / "annotations.json").read_text())
    assert [one["file_name"] for one in whole["images"]] == ["a.png", "b.png", "c.png"]

    (photos / "a.png").unlink()
    (photos / "d.png").write_bytes(PHOTO)
    assert main(command) == 0
    assert "3 photos: 1 segmented, 2 done already" in capsys.readouterr().err
    more = json.loads((out / "annotations.json").read_text())
    assert [one["file_name"] for one in more["images"]] == ["a.png", "b.png", "c.png", "d.png"]
    assert more["annotations"][: len(whole["annotations"])] == whole["annotations"]
    ids = [one["id"] for one in more["annotations"]]
    assert ids == list(range(1, len(ids) + 1))

    assert main([*command, "--overwrite"]) == 0
    replaced = json.loads((out / "annotations.json").read_text())
    assert [one["file_name"] for one in replaced["images"]] == ["b.png", "c.png", "d.png"]

    (out / "annotations.json").write_text("[]")
    assert main(command) == 2
    assert "is not a COCO file of an earlier run" in capsys.readouterr().err


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong options are exit status 2 and one line."""
    command = ["predict", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    for options, reason in (
        (["--classes", "unicorn"], "--classes: no class 'unicorn'"),
        (["--format", "coco", "--mask", "png"], "COCO files carry polygons or rle"),
    ):
        assert main([*command, *options]) == 2
        shown = capsys.readouterr().err
        assert reason in shown
        assert shown.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main([*command, "--jobs", "0"])
    assert caught.value.code == 2


def test_by_a_service(
    tmp_path: Path, protocol_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service's model of the given name writes the same files as the one in this process."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(6):
        (photos / f"{number}.png").write_bytes(PHOTO)
    (photos / "bad.png").write_bytes(PHOTO[:60])
    command = ["predict", str(photos), "--out"]
    remote = ["--url", protocol_server.url, "--jobs", "3"]
    for name in ("mask", "cutout", "coco"):
        here, there = tmp_path / f"{name}-here", tmp_path / f"{name}-there"
        assert main([*command, str(here), "--format", name]) == 1
        assert main([*command, str(there), "--format", name, *remote, "--model", "second"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if "bad.png" in line] == [
            f"fcn-segment: {photos / 'bad.png'}: the PNG data is broken, truncated or of an "
            "unsupported variant"
        ] * 2
        written = sorted(path.name for path in here.iterdir())
        assert written == sorted(path.name for path in there.iterdir())
        for path in here.iterdir():
            if path.name == "annotations.json":
                whole, other = (json.loads((one / path.name).read_text()) for one in (here, there))
                assert {**whole, "info": None} == {**other, "info": None}
            elif path.name != RECORDS_NAME:
                assert path.read_bytes() == (there / path.name).read_bytes()
    out = tmp_path / "json"
    options = ["--format", "json", "--classes", "person", "--max-side", "64"]
    assert main([*command, str(out), *options, *remote, "--model", "second"]) == 1
    answer = json.loads((out / "0.json").read_text())
    assert answer["model"]["name"] == "second"
    assert [one["name"] for one in answer["classes"]] == ["person"]


def test_a_service_that_is_unreachable_or_stops(
    tmp_path: Path,
    protocol_server: Server,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is one line, and no further photo is sent; an unknown model is wrong usage."""
    monkeypatch.setattr(Retries.__init__, "__defaults__", (1, 0.0, 0.0))
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(PHOTO)
    command = ["predict", str(tmp_path), "--out", str(tmp_path / "out"), "--url"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert main([*command, url]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"fcn-segment: {url}: ")
    assert shown.count("\n") == 1
    assert main([*command, protocol_server.url, "--model", "third"]) == 2
    assert "--model: the service has no 'third', only tiny, second" in capsys.readouterr().err
    assert main([*command, "nonsense"]) == 1
    assert "'nonsense' is not a URL" in capsys.readouterr().err

    answered = iter([True, True])
    fetch = AsyncClient.fetch

    async def fetch_twice(
        self: AsyncClient, photo: bytes, media_type: str, query: Mapping[str, Any]
    ) -> bytes:
        if next(answered, False):
            return await fetch(self, photo, media_type, query)
        raise ServiceUnreachable("it broke")

    monkeypatch.setattr(AsyncClient, "fetch", fetch_twice)
    assert main([*command, protocol_server.url, "--jobs", "1"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "fcn-segment: it broke; rerun the command to resume"
    ]
    assert len(visible(tmp_path / "out")) == 2


def test_json_is_asked_for_as_every_release_answers_it(
    tmp_path: Path, protocol_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `Accept` alone: services of 0.1.0 have no view of that name."""
    (tmp_path / "a.png").write_bytes(PHOTO)
    asked: list[tuple[str, bool]] = []
    fetch = AsyncClient.fetch

    async def noted(
        self: AsyncClient, photo: bytes, media_type: str, query: Mapping[str, Any]
    ) -> bytes:
        asked.append((media_type, "view" in query))
        return await fetch(self, photo, media_type, query)

    monkeypatch.setattr(AsyncClient, "fetch", noted)
    command = ["predict", str(tmp_path / "a.png"), "--url", protocol_server.url, "--out"]
    for name in ("json", "coco", "overlay"):
        assert main([*command, str(tmp_path / name), "--format", name]) == 0
    json_type = "application/json"
    assert asked == [(json_type, False), (json_type, False), ("image/png", True)]


def test_a_service_needs_httpx(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, the error says what to install."""
    monkeypatch.setitem(sys.modules, "httpx", None)
    for name in ("service.client", "service.client.client", "service.client.requests"):
        monkeypatch.delitem(sys.modules, name)
    command = ["predict", str(tmp_path / "x"), "--out", str(tmp_path), "--url", "http://x"]
    assert main(command) == 2
    assert "pip install 'fcn-segment[client]'" in capsys.readouterr().err


def test_max_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--max-side is accepted within its bounds; outside it is an error in one line."""
    photo = tmp_path / "a.png"
    photo.write_bytes(PHOTO)
    command = ["predict", str(photo), "--out", str(tmp_path / "out"), "--max-side"]
    assert main([*command, "200"]) == 0
    assert main([*command, "20"]) == 2
    assert capsys.readouterr().err.endswith("fcn-segment: --max-side: 20 is not in 64 to 1280\n")


def test_a_bad_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is no artefact is one line, and nothing is written."""
    out = tmp_path / "out"
    assert main(["predict", "x.png", "--out", str(out), "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_a_terminal_shows_a_progress_bar(tmp_path: Path) -> None:
    """The bar shows the number of photos that are done and in all."""
    (tmp_path / "a.png").write_bytes(PHOTO)
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    done = subprocess.run(
        command_line("predict", tmp_path, "--out", tmp_path / "out"),
        env=environment(),
        stderr=terminal,
        timeout=60,
        check=False,
    )
    os.close(terminal)
    shown = os.read(controller, 65536).decode()
    os.close(controller)
    assert done.returncode == 0
    assert "1/1" in shown
    assert "photo" in shown
