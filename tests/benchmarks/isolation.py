"""The cost of decoding in a separate process, compared with a thread, which the service uses.

    python -m tests.benchmarks.isolation

In a separate process a crash of the decoder fails one request instead of all requests of the
serving process. The process measured here is minimal: one shared mapping for the file and the
pixels, one message each way, no queue and no restart. Writes ``isolation.json`` into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import numpy as np

from service.images.decoding import DecodedPhoto, decode
from service.settings import Settings
from tests.benchmarks.bench import environment, markdown_table
from tests.benchmarks.photos import LANDSCAPE, MEGAPIXELS_12, resized, serving_photos

FILE_BYTES: Final = Settings().max_bytes
PIXEL_BYTES: Final = 3 * Settings().max_pixels
WORKING_SIDE: Final = 512

_ASK: Final = struct.Struct("<2Q")  # file size in bytes; needed side, 0 for the full size
_ANSWER: Final = struct.Struct("<4Q4d")  # of a `DecodedPhoto`: (H, W) of pixels, size, box


class DecodingProcess:
    """Decodes photos in a separate process, for one caller at a time."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("photo")
        os.ftruncate(memory, FILE_BYTES + PIXEL_BYTES)
        self._shared = mmap.mmap(memory, FILE_BYTES + PIXEL_BYTES)
        with theirs:
            descriptors = (theirs.fileno(), memory)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, "--decode", *map(str, descriptors)],
                pass_fds=descriptors,
            )
        os.close(memory)

    def decode(self, data: bytes, needed_side: int | None) -> DecodedPhoto:
        """Like `service.images.decoding.decode`, for valid photos only."""
        self._shared[: len(data)] = data
        self._socket.send(_ASK.pack(len(data), needed_side or 0))
        height, width, *size, left, top, right, bottom = _ANSWER.unpack(
            self._socket.recv(_ANSWER.size)
        )
        shape = (height, width, 3)
        count = height * width * 3
        pixels = np.frombuffer(self._shared, np.uint8, count, FILE_BYTES).reshape(shape).copy()
        return DecodedPhoto(pixels, (size[0], size[1]), (left, top, right, bottom))

    @property
    def private_mib(self) -> float:
        """The memory that it shares with no other process, in MiB."""
        lines = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text(encoding="ascii")
        kib = [int(line.split()[1]) for line in lines.splitlines() if line.startswith("Private_")]
        return sum(kib) / 1024

    def close(self) -> None:
        """Stop the process."""
        self._socket.close()
        self._process.wait()


def work(asks: int, memory: int) -> None:
    """The body of the process: decode until the socket is closed."""
    shared = mmap.mmap(memory, FILE_BYTES + PIXEL_BYTES)
    with socket.socket(fileno=asks) as connection:
        while ask := connection.recv(_ASK.size):
            length, needed_side = _ASK.unpack(ask)
            photo = decode(bytes(shared[:length]), PIXEL_BYTES // 3, needed_side or None)
            target = np.frombuffer(shared, np.uint8, photo.pixels.size, FILE_BYTES)
            target[:] = photo.pixels.reshape(-1)
            height, width, _ = photo.pixels.shape
            connection.send(_ANSWER.pack(height, width, *photo.size, *photo.box))


def measure(out: Path, rounds: int) -> dict[str, Any]:
    """Decode each photo both ways, alternately. Raises `AssertionError` if the pixels differ."""
    source = serving_photos(out / "photos", None, 1)[0]
    cases = {
        "500x375": (resized(source, LANDSCAPE), WORKING_SIDE),
        "4000x3000, at a fraction": (resized(source, MEGAPIXELS_12), WORKING_SIDE),
        "4000x3000, in full": (resized(source, MEGAPIXELS_12), None),
    }
    rows = []
    started = time.perf_counter()
    with closing(DecodingProcess()) as process:
        process.decode(*cases["500x375"])
        start_s = time.perf_counter() - started
        for name, (data, side) in cases.items():
            here = decode(data, PIXEL_BYTES // 3, side)
            there = process.decode(data, side)
            assert np.array_equal(here.pixels, there.pixels), name
            assert (here.size, here.box) == (there.size, there.box), name
            thread_ms, process_ms = [], []
            for _ in range(rounds):
                thread_ms.append(_ms(lambda: decode(data, PIXEL_BYTES // 3, side)))  # noqa: B023
                process_ms.append(_ms(lambda: process.decode(data, side)))  # noqa: B023
            medians = statistics.median(thread_ms), statistics.median(process_ms)
            rows.append(
                {
                    "photo": name,
                    "thread_ms": medians[0],
                    "process_ms": medians[1],
                    "ratio": medians[1] / medians[0],
                }
            )
        memory_mib = process.private_mib
    return {"rows": rows, "start_s": start_s, "private_mib": memory_mib}


def _ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure, or run as the decoding process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/isolation"), help="folder (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=100, help="rounds per photo (%(default)s)")
    parser.add_argument("--decode", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.decode:
        work(*given.decode)
        return
    found = measure(given.out, given.rounds)
    print(
        markdown_table(
            ("photo", "thread, ms", "process, ms", "ratio"),
            [
                (
                    row["photo"],
                    *(f"{row[key]:.2f}" for key in ("thread_ms", "process_ms", "ratio")),
                )
                for row in found["rows"]
            ],
        )
    )
    print(f"{found['private_mib']:.0f} MiB of private memory, ready in {found['start_s']:.2f} s")
    found["environment"] = environment(("numpy", "pillow", "simplejpeg"))
    (given.out / "isolation.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
