"""``fcn-segment predict`` on files and folders."""

import json
import os
import pty
import subprocess
import termios
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.cli import main
from tests.artefacts import encode, two_class_photo
from tests.clients import command_line, environment

PHOTO = encode(two_class_photo())


@pytest.fixture(autouse=True)
def tiny_model(tiny_artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command uses the tiny artefact."""
    monkeypatch.setenv("FCN_MODEL", str(tiny_artefact))
    monkeypatch.setenv("FCN_THREADS", "1")


def test_masks_of_a_file_and_a_folder(tmp_path: Path) -> None:
    """Palette PNGs under the stems, in the folder's own shape, and the exit status 0."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.png").write_bytes(PHOTO)
    (tmp_path / "single.photo").write_bytes(PHOTO)
    out = tmp_path / "out"
    assert main(["predict", f"{tmp_path}/in", f"{tmp_path}/single.photo", "--out", str(out)]) == 0
    written = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert written == ["deep/a.png", "single.png"]
    with Image.open(out / "single.png") as image:
        assert (image.mode, image.size) == ("P", (96, 64))
        assert np.asarray(image)[30, 80] == 15
    assert (out / "single.png").stat().st_mode & 0o777 == 0o644


def test_one_bad_file_does_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is one line on stderr, and the exit status is 1 at the end."""
    (tmp_path / "a.jpg").write_bytes(b"hello")
    (tmp_path / "b.png").write_bytes(PHOTO)
    (tmp_path / "c.png").write_bytes(PHOTO[:60])
    missing = tmp_path / "missing.png"
    out = tmp_path / "out"
    assert main(["predict", str(tmp_path), str(missing), "--out", str(out)]) == 1
    assert [path.name for path in out.iterdir()] == ["b.png"]
    lines = capsys.readouterr().err.splitlines()
    for name, reason in [
        ("a.jpg", "not an image of an allowed type"),
        ("c.png", "broken, truncated"),
        ("missing.png", "No such file"),
    ]:
        assert any(name in line and reason in line for line in lines)
    assert lines[-1] == "fcn-segment: 3 photos failed"
    assert len(lines) == 4


def test_overlay_and_json(tmp_path: Path) -> None:
    """The other two views; an earlier answer is overwritten."""
    photo = tmp_path / "a.png"
    photo.write_bytes(PHOTO)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.json").write_text("old")
    assert main(["predict", str(photo), "--out", str(out), "--view", "overlay"]) == 0
    assert main(["predict", str(photo), "--out", str(out), "--view", "json"]) == 0
    with Image.open(out / "a.png") as image:
        assert (image.mode, image.size) == ("RGB", (96, 64))
    assert json.loads((out / "a.json").read_text())["classes"][0]["name"] == "person"
    assert sorted(path.name for path in out.iterdir()) == ["a.json", "a.png"]


def test_max_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Passed on within its bounds, refused in one line outside."""
    photo = tmp_path / "a.png"
    photo.write_bytes(PHOTO)
    command = ["predict", str(photo), "--out", str(tmp_path / "out"), "--max-side"]
    assert main([*command, "200"]) == 0
    assert main([*command, "20"]) == 2
    assert capsys.readouterr().err == "fcn-segment: --max-side: 20 is not in 64 to 2048\n"


def test_a_bad_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--model names the artefact; nothing is written without one."""
    out = tmp_path / "out"
    assert main(["predict", "x.png", "--out", str(out), "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_a_terminal_shows_a_progress_bar(tmp_path: Path) -> None:
    """Photos done, photos in all; a pipe would get none."""
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
