"""Downloads that are interrupted, moved or altered, and the unpacking of archives."""

import errno
import hashlib
import io
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]

from models.__main__ import main
from models.dataset import read_split
from models.stages import fetch
from models.stages.fetch import Source
from tests.voc_data import make_voc

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = hashlib.sha256(b"another file").hexdigest()


def sha256(content: bytes) -> str:
    """Hexadecimal."""
    return hashlib.sha256(content).hexdigest()


class Request(BaseHTTPRequestHandler):
    """One request to a `Mirror`."""

    server: "Mirror"

    def do_GET(self) -> None:
        """Use the next of the server's answers; by default, behave well."""
        self.server.requests.append(self.headers)
        answer = self.server.answers.pop(0) if self.server.answers else well_behaved
        answer(self)

    def send(
        self, status: int, content: bytes, *, promised: int | None = None, **headers: str
    ) -> None:
        """Send an answer whose Content-Length may be larger than its content."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if promised is None else promised))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


Answer = Callable[[Request], None]


class Mirror(ThreadingHTTPServer):
    """A loopback server of one file, whose first answers can be set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.content = CONTENT
        self.etag = '"first"'
        self.answers: list[Answer] = []
        self.requests: list[Message] = []
        self.url = f"http://127.0.0.1:{self.server_port}/weights.pth"

    def asked(self) -> list[tuple[str | None, str | None]]:
        """Range and If-Range of each request."""
        return [(request["Range"], request["If-Range"]) for request in self.requests]


def well_behaved(request: Request) -> None:
    """RFC 9110: Range, unless If-Range names another file; 416 at the end of the file."""
    content, etag = request.server.content, request.server.etag
    asked = request.headers["Range"]
    if asked is None or request.headers.get("If-Range", etag) != etag:
        request.send(200, content, ETag=etag)
        return
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    if start >= len(content):
        request.send(416, b"", Content_Range=f"bytes */{len(content)}")
    else:
        last = len(content) - 1
        span = f"bytes {start}-{last}/{len(content)}"
        request.send(206, content[start:], ETag=etag, Content_Range=span)


def breaks_off(request: Request) -> None:
    """Announce the whole file and send a third of it."""
    content = request.server.content
    request.send(200, content[: len(content) // 3], promised=len(content), ETag=request.server.etag)


def breaks_off_in_a_chunk(request: Request) -> None:
    """Announce the whole file as one chunk, without a Content-Length, and send a third of it."""
    content = request.server.content
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"%x\r\n" % len(content) + content[: len(content) // 3])


def breaks_off_and_changes(request: Request) -> None:
    """Break off, then replace the file by another one."""
    breaks_off(request)
    request.server.content = CONTENT[::-1]
    request.server.etag = '"second"'


def ignores_range(request: Request) -> None:
    """Send the whole file to every request."""
    request.send(200, request.server.content)


def corrupts(request: Request) -> None:
    """Send the right number of wrong bytes."""
    request.send(200, request.server.content[::-1])


def says(status: int) -> Answer:
    """Send a status and nothing else."""
    return lambda request: request.send(status, b"")


def redirects_to(url: str) -> Answer:
    """Send the client elsewhere."""
    return lambda request: request.send(302, b"", Location=url)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """A running server."""
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Records the pauses between attempts without waiting; disables the developer's proxy."""
    waited: list[float] = []
    monkeypatch.setattr(fetch, "sleep", waited.append)
    monkeypatch.setenv("no_proxy", "*")
    return waited


class Weights:
    """``fetch resnet50`` from a test mirror."""

    def __init__(self, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.target = target
        self.part = target.with_name("weights.pth.part")
        self._monkeypatch = monkeypatch

    def fetch(self, *urls: str, content: bytes = CONTENT, options: tuple[str, ...] = ()) -> int:
        """Return the exit status."""
        source = Source(urls, sha256(content))
        self._monkeypatch.setitem(fetch.SOURCES, "resnet50", source)
        return main(["fetch", "resnet50", "--out", str(self.target), *options])


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """Into a folder that does not exist yet."""
    return Weights(tmp_path / "new" / "weights.pth", monkeypatch)


def test_a_file_is_fetched_and_its_sha256_printed(
    mirror: Mirror, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the file itself remains."""
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT
    assert list(weights.target.parent.iterdir()) == [weights.target]
    assert sha256(CONTENT) in capsys.readouterr().out


def test_what_is_there_is_not_fetched_again(
    mirror: Mirror, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run sends no request."""
    weights.fetch(mirror.url)
    assert weights.fetch(mirror.url) == 0
    assert "already there" in capsys.readouterr().out
    assert len(mirror.requests) == 1


def test_after_a_break_the_rest_is_asked_for(
    mirror: Mirror, weights: Weights, waits: list[float]
) -> None:
    """With If-Range, so that the rest is from the same file; after a pause."""
    mirror.answers = [breaks_off]
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT
    assert mirror.asked() == [(None, None), ("bytes=100000-", '"first"')]
    assert waits == [1.0]


def test_a_break_is_noticed_without_a_length(mirror: Mirror, weights: Weights) -> None:
    """The whole blocks before it are kept."""
    mirror.answers = [breaks_off_in_a_chunk]
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT
    assert mirror.asked()[1] == ("bytes=65536-", None)


def test_a_later_run_goes_on_where_the_last_one_stopped(mirror: Mirror, weights: Weights) -> None:
    """Bytes that a killed run received are not requested again."""
    weights.part.parent.mkdir()
    weights.part.write_bytes(CONTENT[:200_000])
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT
    assert mirror.asked() == [("bytes=200000-", None)]


def test_a_file_that_changed_meanwhile_is_fetched_again(mirror: Mirror, weights: Weights) -> None:
    """Another ETag: the first third is discarded."""
    mirror.answers = [breaks_off_and_changes]
    assert weights.fetch(mirror.url, content=CONTENT[::-1]) == 0
    assert weights.target.read_bytes() == CONTENT[::-1]
    assert mirror.asked()[1] == ("bytes=100000-", '"first"')


def test_a_weak_etag_is_no_promise(mirror: Mirror, weights: Weights) -> None:
    """RFC 9110 forbids it in If-Range."""
    mirror.etag = 'W/"first"'
    mirror.answers = [breaks_off]
    assert weights.fetch(mirror.url) == 0
    assert mirror.asked()[1] == ("bytes=100000-", None)


def test_a_server_without_ranges_starts_again(mirror: Mirror, weights: Weights) -> None:
    """Its answer replaces the partial file."""
    mirror.answers = [breaks_off, ignores_range]
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT


def test_nothing_left_to_fetch_is_complete(mirror: Mirror, weights: Weights) -> None:
    """A run was killed just before the end: 416 means that the file is complete."""
    weights.part.parent.mkdir()
    weights.part.write_bytes(CONTENT)
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT
    assert len(mirror.requests) == 1


def test_more_than_the_file_is_thrown_away(mirror: Mirror, weights: Weights) -> None:
    """416 for another length: the partial file is another file."""
    weights.part.parent.mkdir()
    weights.part.write_bytes(CONTENT + b"more")
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT
    assert mirror.asked() == [("bytes=300004-", None), (None, None)]


def test_a_busy_server_is_asked_again(mirror: Mirror, weights: Weights, waits: list[float]) -> None:
    """After increasing pauses."""
    mirror.answers = [says(503), says(503), says(429)]
    assert weights.fetch(mirror.url) == 0
    assert waits == [1.0, 2.0, 4.0]


def test_a_server_that_stays_busy_is_given_up(
    mirror: Mirror, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """After one attempt more than there are pauses."""
    mirror.answers = [says(503)] * 9
    assert weights.fetch(mirror.url) == 1
    assert len(mirror.requests) == 5
    assert "HTTP Error 503: Service Unavailable" in last_line(capsys)


def test_redirects_are_followed(mirror: Mirror, weights: Weights) -> None:
    """Archives move; the range is requested at the new URL too."""
    mirror.answers = [redirects_to(f"{mirror.url}?moved"), breaks_off, redirects_to(mirror.url)]
    assert weights.fetch(mirror.url) == 0
    assert weights.target.read_bytes() == CONTENT
    assert mirror.asked()[2:] == [("bytes=100000-", '"first"')] * 2


@pytest.mark.parametrize(
    ("url", "refusal"),
    [
        ("file:///etc/hostname", "redirection to url 'file:///etc/hostname' is not allowed"),
        ("ftp://127.0.0.1/weights.pth", "unknown url type: ftp"),
    ],
)
def test_only_http_is_followed(
    mirror: Mirror,
    weights: Weights,
    url: str,
    refusal: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server cannot redirect to the user's own files."""
    mirror.answers = [redirects_to(url)] * 5
    assert weights.fetch(mirror.url) == 1
    assert refusal in last_line(capsys).lower()


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of a failed run's output, which has no traceback."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


def test_a_wrong_file_is_removed_and_named(
    mirror: Mirror, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message has both digests, so that the user can look up either."""
    mirror.answers = [corrupts]
    assert weights.fetch(mirror.url) == 1
    assert list(weights.target.parent.iterdir()) == []
    said = last_line(capsys)
    assert f"sha256 {sha256(CONTENT[::-1])}, expected {sha256(CONTENT)}" in said


def test_another_file_in_its_place_is_left_alone(
    mirror: Mirror, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user's own file is neither replaced nor used."""
    weights.target.parent.mkdir()
    weights.target.write_bytes(b"mine")
    assert weights.fetch(mirror.url) == 1
    assert weights.target.read_bytes() == b"mine"
    assert "move it away" in last_line(capsys)
    assert mirror.requests == []


def test_a_missing_file_is_one_line(
    mirror: Mirror,
    weights: Weights,
    waits: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """404 is not retried; the message says where to put a file from another source."""
    mirror.answers = [says(404)]
    assert weights.fetch(mirror.url) == 1
    assert waits == []
    said = last_line(capsys)
    assert said.startswith(f"fetch: {mirror.url}: HTTP Error 404: Not Found")
    assert f"put it at {weights.target}" in said


def test_the_next_mirror_is_asked(mirror: Mirror, weights: Weights) -> None:
    """If the previous one lacks the file or has another one."""
    mirror.answers = [says(404), corrupts]
    assert weights.fetch(*[mirror.url] * 3) == 0
    assert weights.target.read_bytes() == CONTENT


def test_an_unknown_host_is_one_line(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message includes the resolver's."""

    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert weights.fetch("http://nowhere.invalid/weights.pth") == 1
    assert "nowhere.invalid/weights.pth: [Errno -2] Name or service not known" in last_line(capsys)


def test_a_silent_server_is_one_line(
    weights: Weights, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port that accepts and never answers."""
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert weights.fetch(f"http://127.0.0.1:{port}/weights.pth") == 1
    assert "timed out" in last_line(capsys)


def test_a_full_disk_is_one_line(
    mirror: Mirror, weights: Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not the server's fault: no retry."""
    weights.part.parent.mkdir()
    weights.part.symlink_to("/dev/full")
    assert weights.fetch(mirror.url) == 1
    assert "the disk is full; free some space" in last_line(capsys)
    assert len(mirror.requests) == 1


def test_the_user_can_demand_a_sha256(mirror: Mirror, weights: Weights) -> None:
    """It replaces the documented one."""
    assert weights.fetch(mirror.url, options=("--sha256", OTHER)) == 1
    assert not weights.target.exists()
    assert weights.fetch(mirror.url, options=("--sha256", sha256(CONTENT).upper())) == 0


@pytest.mark.parametrize("arguments", [["coco"], ["resnet50", "--sha256", "abc"], []])
def test_wrong_arguments_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By argparse, before any download."""
    with pytest.raises(SystemExit, match="2"):
        main(["fetch", *arguments])
    assert "usage: python -m models fetch" in capsys.readouterr().err


def test_the_sources_are_what_their_names_say() -> None:
    """PyTorch's file name ends in its first eight digits; the others are whole sha256s."""
    source = fetch.SOURCES["resnet50"]
    assert source.name == f"resnet50-{source.sha256[:8]}.pth"
    assert all(len(bytes.fromhex(source.sha256)) == 32 for source in fetch.SOURCES.values())


class Archives:
    """Small VOC and SBD archives in ``--data``, so that nothing is downloaded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data = folder / "data"
        self.data.mkdir()
        self.voc = make_voc(folder, images=6)
        # VOC has a mask of each of its photos.
        for name in ("2007_000002", "2007_000005"):
            (self.voc / f"VOC2012/SegmentationClassAug/{name}.png").rename(
                self.voc / f"VOC2012/SegmentationClass/{name}.png"
            )
        self.split("train", [0, 1, 2])
        self.split("val", [3, 4, 5])
        (self.voc / "VOC2012/Annotations").mkdir()
        (self.voc / "VOC2012/Annotations/2007_000000.xml").touch()
        self._monkeypatch = monkeypatch

    def split(self, name: str, numbers: list[int]) -> None:
        """Write one of VOC's lists."""
        listing = self.voc / f"VOC2012/ImageSets/Segmentation/{name}.txt"
        listing.write_text("".join(f"2007_{number:06}\n" for number in numbers), encoding="utf-8")

    def pack(self, name: str, files: dict[str, bytes], mode: str = "w") -> None:
        """Put an archive where ``fetch`` looks first, with the sha256 that it expects."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
            for path, content in files.items():
                member = tarfile.TarInfo(path)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        source = Source((f"http://nowhere.invalid/{name}.tar",), sha256(buffer.getvalue()))
        self._monkeypatch.setitem(fetch.SOURCES, name, source)
        (self.data / source.name).write_bytes(buffer.getvalue())

    def pack_voc(self, prefix: str = "", more: dict[str, bytes] | None = None) -> None:
        """VOC's archive."""
        files = {
            f"{prefix}VOCdevkit/{path.relative_to(self.voc).as_posix()}": path.read_bytes()
            for path in sorted(self.voc.rglob("*.*"))
        }
        self.pack("voc2012", files | (more or {}))

    def pack_sbd(self) -> None:
        """SBD's archive: two photos of VOC's train, one of its val, two with masks in SBD only."""
        files = {}
        for number in (1, 2, 4, 10, 11):
            name = f"benchmark_RELEASE/dataset/{{}}/2007_{number:06}.{{}}"
            mask, image = io.BytesIO(), io.BytesIO()
            labels = np.full((96, 128), number, np.uint8)
            savemat(mask, {"GTcls": {"Boundaries": np.zeros((20, 1)), "Segmentation": labels}})
            Image.new("RGB", (128, 96)).save(image, format="JPEG")
            files[name.format("cls", "mat")] = mask.getvalue()
            files[name.format("img", "jpg")] = image.getvalue()
            files[name.format("inst", "mat")] = b"not read"
        lists = {"train": "2007_000001\n2007_000004\n2007_000010\n", "val": "2007_000011\n"}
        for split, names in lists.items():
            files[f"benchmark_RELEASE/dataset/{split}.txt"] = names.encode()
        self.pack("sbd", files, mode="w:gz")

    def fetch(self, name: str) -> int:
        """Return the exit status."""
        return main(["fetch", name, "--data", str(self.data)])


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archives:
    """Nothing is packed yet."""
    return Archives(tmp_path, monkeypatch)


@pytest.mark.parametrize("prefix", ["", "./"])
def test_voc_is_unpacked_for_segmentation(archives: Archives, prefix: str) -> None:
    """Both lists can be loaded; box annotations are not unpacked."""
    archives.pack_voc(prefix)
    assert archives.fetch("voc2012") == 0
    samples = read_split(archives.data, "train") + read_split(archives.data, "val")
    assert [sample.name for sample in samples] == [f"2007_{n:06}" for n in range(6)]
    assert {sample.load()[0].size for sample in samples} == {(128, 96)}
    assert not (archives.data / "VOC2012/Annotations").exists()


def test_sbds_masks_go_beside_vocs(archives: Archives) -> None:
    """``trainaug`` is VOC's train and both of SBD's lists, without duplicates and VOC's val."""
    archives.pack_voc()
    archives.pack_sbd()
    assert archives.fetch("voc2012") == 0
    assert archives.fetch("sbd") == 0
    samples = read_split(archives.data, "trainaug")
    assert [sample.name for sample in samples] == [
        f"2007_{number:06}" for number in (0, 1, 2, 10, 11)
    ]
    folders = [sample.mask_path.parent.name for sample in samples]
    assert folders == ["SegmentationClass"] * 3 + ["SegmentationClassAug"] * 2
    assert set(np.asarray(samples[3].load()[1]).flat) == {10}


def test_vocs_own_photos_stay(archives: Archives) -> None:
    """SBD's photo is used only where VOC has none."""
    archives.pack_voc()
    archives.pack_sbd()
    archives.fetch("voc2012")
    archives.fetch("sbd")
    photo = "VOC2012/JPEGImages/2007_000001.jpg"
    assert (archives.data / photo).read_bytes() == (archives.voc / photo).read_bytes()


def test_sbds_masks_have_vocs_colours(archives: Archives) -> None:
    """They have VOC's palette."""
    archives.pack_voc()
    archives.pack_sbd()
    archives.fetch("voc2012")
    archives.fetch("sbd")
    with (
        Image.open(archives.data / "VOC2012/SegmentationClassAug/2007_000010.png") as sbd,
        Image.open(archives.data / "VOC2012/SegmentationClass/2007_000000.png") as voc,
    ):
        assert (sbd.mode, sbd.getpalette()) == (voc.mode, voc.getpalette())


def test_unpacked_archives_are_not_needed_again(
    archives: Archives, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be deleted: unpacked data is neither fetched nor unpacked again."""
    archives.pack_voc()
    archives.pack_sbd()
    for name in ("voc2012", "sbd"):
        assert archives.fetch(name) == 0
        (archives.data / fetch.SOURCES[name].name).unlink()
        assert archives.fetch(name) == 0
        assert f"{name} is already there" in capsys.readouterr().out


def test_unpacking_that_was_interrupted_is_done_again(archives: Archives) -> None:
    """It is detected by a missing file."""
    archives.pack_voc()
    archives.fetch("voc2012")
    mask = archives.data / "VOC2012/SegmentationClass/2007_000004.png"
    mask.unlink()
    assert archives.fetch("voc2012") == 0
    assert mask.is_file()


def test_sbd_needs_voc(archives: Archives, capsys: pytest.CaptureFixture[str]) -> None:
    """Reported before the download of 1.4 GB."""
    assert archives.fetch("sbd") == 1
    assert "fetch voc2012 first" in last_line(capsys)


def test_an_archive_cannot_write_elsewhere(
    archives: Archives, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path outside the folder is refused, and no list is written."""
    archives.pack_voc(more={"VOCdevkit/../../evil": b""})
    assert archives.fetch("voc2012") == 1
    assert "evil" in last_line(capsys)
    assert not list(archives.data.parent.rglob("evil"))
    assert not (archives.data / "VOC2012/ImageSets").exists()


def test_what_is_no_archive_is_refused(
    archives: Archives, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only possible with the user's own sha256."""
    archives.pack_voc()
    (archives.data / "voc2012.tar").write_bytes(CONTENT)
    arguments = ["--data", str(archives.data), "--sha256", sha256(CONTENT)]
    assert main(["fetch", "voc2012", *arguments]) == 1
    assert "cannot be unpacked" in last_line(capsys)


def test_a_list_exists_only_after_all_of_its_files(
    archives: Archives, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves no list, so that the next run unpacks again."""
    archives.pack_voc()
    assert archives.fetch("voc2012") == 0
    (archives.data / "VOC2012/SegmentationClass/2007_000004.png").unlink()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lists = archives.data / "VOC2012/ImageSets/Segmentation"
    for target, name in ((tarfile.TarFile, "extractall"), (fetch, "replace_file")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            assert archives.fetch("voc2012") == 1
        assert "the disk is full" in last_line(capsys)
        assert not list(lists.iterdir())
    assert archives.fetch("voc2012") == 0
    assert len(read_split(archives.data, "val")) == 3
