r"""Download VOC 2012, SBD's masks and ImageNet's ResNet-50 for training.

    python -m models fetch voc2012 --data VOCdevkit
    python -m models fetch sbd --data VOCdevkit
    python -m models fetch resnet50 --out resnet50.pth

A file is used only after its sha256 is verified. Data is written to a ``.part`` file; after a
broken connection, or when the command is rerun, only the rest is requested. pooch and torch.hub
cannot do that: they restart a file of 2 GB. Existing files are not downloaded again.

An archive stays in ``--data`` and may be deleted. Only the parts of VOC that segmentation needs are
unpacked. SBD's masks become ``VOC2012/SegmentationClassAug/*.png``. The list ``trainaug`` is VOC's
train and all of SBD without VOC's val: the standard 10,582 images.
"""

from __future__ import annotations

import argparse
import errno
import io
import re
import sys
import tarfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from time import sleep
from typing import IO
from urllib.error import HTTPError

from PIL import Image
from tqdm import tqdm

from models.dataset import DatasetError, read_split, voc_root
from models.errors import StageError
from service.artefact.files import replace_file, sha256_of, write_atomically
from service.artefact.voc import FULL_PALETTE

TIMEOUT_S = 30.0
PAUSES_S = (1.0, 2.0, 4.0, 8.0)
"""Pauses between attempts at one mirror."""
BLOCK_BYTES = 1 << 16


class FetchError(StageError):
    """A file cannot be downloaded or is not the expected one; the message says what to do."""


class _Interrupted(Exception):
    """The connection broke or the server is busy: worth another attempt."""


@dataclass(frozen=True)
class Source:
    """A public file: its mirrors in order of preference, and its sha256."""

    urls: tuple[str, ...]
    sha256: str

    @property
    def name(self) -> str:
        """File name."""
        return PurePosixPath(self.urls[0]).name


# The archives' sha256 come from torchvision (torchvision/prototype/datasets/_builtin/voc.py and
# sbd.py). For the weights, torchvision documents the first eight digits in the file's name; the
# others are as public projects pin them. The weights are IMAGENET1K_V1, the start of torchvision's
# own FCN.
SOURCES = {
    "voc2012": Source(
        (
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "https://data.pjreddie.com/files/VOCtrainval_11-May-2012.tar",
        ),
        "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
    ),
    "sbd": Source(
        (
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/"
            "semantic_contours/benchmark.tgz",
        ),
        "6a5a2918d5c73ce032fdeba876574d150d9d04113ab87540a1304cbcc715be53",
    ),
    "resnet50": Source(
        ("https://download.pytorch.org/models/resnet50-0676ba61.pth",),
        "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",
    ),
}
SPLITS = {"voc2012": ("train", "val"), "sbd": ("trainaug",)}
"""The splits that an unpacked archive completes."""
SEGMENTATION = (
    "VOC2012/ImageSets/Segmentation/",
    "VOC2012/JPEGImages/",
    "VOC2012/SegmentationClass/",
)


def make_opener() -> urllib.request.OpenerDirector:
    """Return urllib's default opener without ``file:``, ``ftp:`` and ``data:``."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


class Download:
    """Download of one URL into a file; it resumes from the file's existing content."""

    def __init__(self, url: str, part: Path) -> None:
        self.url = url
        self.part = part
        self._opener = make_opener()
        self._etag: str | None = None

    def run(self) -> None:
        """Receive the whole file, with further attempts after a broken connection.

        Raises:
            FetchError: the server refuses, or every attempt failed.
        """
        for pause_s in (*PAUSES_S, None):
            try:
                self._receive()
                return
            except _Interrupted as exc:
                if pause_s is None:
                    raise FetchError(f"{self.url}: {exc}") from exc
                print(f"{self.url}: {exc}; retry in {pause_s:.0f} s", file=sys.stderr)
                sleep(pause_s)

    def _receive(self) -> None:
        """Append the missing bytes; restart if the server has no ranges or another file."""
        offset = self.part.stat().st_size if self.part.exists() else 0
        response = self._open(offset)
        if response is None:
            return
        with response:
            etag = response.headers["ETag"]
            # A weak one does not promise the same bytes (RFC 9110, 13.1.5).
            self._etag = None if etag is None or etag.startswith("W/") else etag
            if response.status != 206:
                offset = 0
            length = response.headers["Content-Length"]
            total = None if length is None else offset + int(length)
            progress = tqdm(total=total, initial=offset, unit="B", unit_scale=True, disable=None)
            with self.part.open("ab" if offset else "wb") as file, progress:
                for block in blocks(response):
                    file.write(block)
                    progress.update(len(block))
        received = self.part.stat().st_size
        if total is not None and received < total:
            raise _Interrupted(f"the connection broke after {received} of {total} bytes")

    def _open(self, offset: int) -> HTTPResponse | None:
        """Request the bytes from ``offset``; None if the file is complete."""
        headers = {"User-Agent": "fcn-segment"}
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if self._etag:
                headers["If-Range"] = self._etag
        request = urllib.request.Request(self.url, headers=headers)  # noqa: S310  (see make_opener)
        try:
            response: HTTPResponse = self._opener.open(request, timeout=TIMEOUT_S)
        except HTTPError as exc:
            with exc:
                if exc.code == 416 and exc.headers["Content-Range"] == f"bytes */{offset}":
                    return None
            if exc.code == 416:
                self.part.unlink(missing_ok=True)
            elif exc.code not in (408, 429) and exc.code < 500:
                raise FetchError(f"{self.url}: {exc}") from exc
            raise _Interrupted(str(exc)) from exc
        except (OSError, HTTPException) as exc:
            raise _Interrupted(str(getattr(exc, "reason", exc))) from exc
        return response


def blocks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the received data; translate errors of receiving only."""
    try:
        while block := response.read(BLOCK_BYTES):
            yield block
    except (OSError, HTTPException) as exc:
        raise _Interrupted(str(exc)) from exc


def fetch(source: Source, target: Path) -> None:
    """Download ``source`` to ``target`` from the first mirror that has the right file.

    Raises:
        FetchError: ``target`` is another file, or no mirror has the right one. A partial download
            stays in ``<target>.part``; a wrong file is removed.
    """
    if target.exists():
        actual = sha256_of(target)
        if actual != source.sha256:
            raise FetchError(
                f"{target}: sha256 {actual}, expected {source.sha256}; move it away and try again"
            )
        print(f"{target}: already there, sha256 {actual}")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    problems = []
    for url in source.urls:
        try:
            Download(url, part).run()
        except FetchError as exc:
            problems.append(str(exc))
            continue
        actual = sha256_of(part)
        if actual == source.sha256:
            part.replace(target)
            print(f"{target}: sha256 {actual}")
            return
        part.unlink()
        problems.append(f"{url}: sha256 {actual}, expected {source.sha256}")
    raise FetchError(
        f"{'; '.join(problems)}. Rerun the command later, or get {source.name} "
        f"elsewhere, put it at {target} and rerun the command"
    )


def unpack_voc(archive: Path, data: Path) -> None:
    """Unpack the files for segmentation into ``data/VOC2012``.

    Raises:
        FetchError: not a tar archive, or it would write a file outside ``data``.
    """

    def select(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        name = str(PurePosixPath(member.name)).removeprefix("VOCdevkit/")
        checked = tarfile.data_filter(member.replace(name=name, deep=False), path)
        return checked if checked.name.startswith(SEGMENTATION) else None

    try:
        with tarfile.open(archive, "r:") as tar:
            lists, others = [], []
            for member in tar.getmembers():
                is_list = "ImageSets" in member.name and member.isfile()
                checked = select(member, str(data)) if is_list else None
                if checked is not None:
                    (data / checked.name).unlink(missing_ok=True)
                    lists.append((member, data / checked.name))
                elif not is_list:
                    others.append(member)
            progress = tqdm(others, desc=archive.name, unit="files", disable=None)
            tar.extractall(data, progress, filter=select)  # noqa: S202  (data_filter checks)
            # The lists last and whole, so that every file in a list exists.
            for member, path in lists:
                with tar.extractfile(member) or io.BytesIO() as file:
                    replace_file(path, file.read())
    except tarfile.TarError as exc:
        raise FetchError(f"{archive}: cannot be unpacked: {exc}") from exc


def unpack_sbd(archive: Path, data: Path) -> None:
    """Write SBD's masks, then the list ``trainaug``, beside VOC's.

    Raises:
        DatasetError: VOC is missing.
        FetchError: not a tar archive.
    """
    root = voc_root(data)
    names = {sample.name for sample in read_split(data, "train")}
    (root / "SegmentationClassAug").mkdir(exist_ok=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            progress = tqdm(tar, desc=archive.name, unit="files", disable=None)
            for path, file in regular_files(tar, progress):
                image = root / "JPEGImages" / f"{path.stem}.jpg"
                if path.match("dataset/cls/[!.]*.mat"):
                    save_mask(file, root / "SegmentationClassAug" / f"{path.stem}.png")
                elif path.match("dataset/img/[!.]*.jpg") and not image.exists():
                    replace_file(image, file.read())
                elif path.match("dataset/train.txt") or path.match("dataset/val.txt"):
                    names.update(file.read().decode().split())
    except tarfile.TarError as exc:
        raise FetchError(f"{archive}: cannot be unpacked: {exc}") from exc
    names -= {sample.name for sample in read_split(data, "val")}
    listing = root / "ImageSets" / "Segmentation" / "trainaug.txt"
    replace_file(listing, "".join(f"{name}\n" for name in sorted(names)).encode())


def regular_files(
    tar: tarfile.TarFile, members: Iterable[tarfile.TarInfo]
) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """Yield the files of an archive without extracting it."""
    for member in members:
        file = tar.extractfile(member)
        if file is not None:
            yield PurePosixPath(member.name), file


def save_mask(mat: IO[bytes], path: Path) -> None:
    """Write the class ids in SBD's ``GTcls.Segmentation``, (H, W) uint8, as VOC's palette PNG."""
    # Imported here, so that the command starts without SciPy.
    from scipy.io import loadmat  # type: ignore[import-untyped]  # noqa: PLC0415

    # From memory: loadmat seeks back, and a gzip archive would be read from its start each time.
    labels = loadmat(io.BytesIO(mat.read()))["GTcls"][0]["Segmentation"][0]
    mask = Image.fromarray(labels)
    mask.putpalette(FULL_PALETTE.tobytes())
    with write_atomically(path) as file:
        mask.save(file, format="PNG")


def is_complete(name: str, data: Path) -> bool:
    """Return whether ``data`` contains every file in an archive's lists."""
    try:
        return all(read_split(data, split) for split in SPLITS[name])
    except DatasetError:
        return False


def fetch_data(name: str, source: Source, archive: Path, data: Path) -> None:
    """Fetch an archive and unpack it into ``data``, unless it is there.

    Raises:
        DatasetError: the archive lacks a file in its lists; the message names it.
        FetchError: SBD needs VOC first; see also `fetch`, `unpack_voc` and `unpack_sbd`.
    """
    if is_complete(name, data):
        print(f"{data}: {name} is already there")
        return
    if name == "sbd" and not is_complete("voc2012", data):
        raise FetchError(f"{data}: SBD's masks need VOC's photos; fetch voc2012 first")
    fetch(source, archive)
    unpack = {"voc2012": unpack_voc, "sbd": unpack_sbd}[name]
    unpack(archive, data)
    for split in SPLITS[name]:
        print(f"{data}: {split}, {len(read_split(data, split))} images")


def sha256_digits(text: str) -> str:
    """Parse ``--sha256``."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError("expected 64 hexadecimal digits")
    return text.lower()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--data", type=Path, default=Path("VOCdevkit"), help="default: VOCdevkit")
    parser.add_argument(
        "--out",
        type=Path,
        help="path of the file; default: resnet50.pth, an archive in --data",
    )
    parser.add_argument(
        "--sha256", type=sha256_digits, help="expected sha256, instead of the documented one"
    )


def main(args: argparse.Namespace) -> int:
    """Fetch, verify and unpack."""
    source = SOURCES[args.name]
    if args.sha256:
        source = replace(source, sha256=args.sha256)
    try:
        if args.name == "resnet50":
            fetch(source, args.out or Path("resnet50.pth"))
        else:
            fetch_data(args.name, source, args.out or args.data / source.name, args.data)
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        raise FetchError("the disk is full; free some space and rerun the command") from exc
    return 0
