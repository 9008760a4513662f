"""How the service and an image worker exchange data: a file in memory and a socket.

The parts of a message lie one after the other in the file; the socket carries their lengths. Both
sides map the beginning of the file, which is enough for most messages, and copy out of it what they
read. It can grow but not shrink, so that neither side can crash the other by truncating it, and it
needs no ``/dev/shm``, which containers limit to 64 MiB. Source: ``memfd_create(2)``.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from service.system import free_range

Part = bytes | bytearray | memoryview | npt.NDArray[Any]
"""Bytes or a C-contiguous array."""

MAX_PARTS: Final = 64

MAPPED_BYTES: Final = 4 * 2**20
"""The part of the file that is mapped. What a larger message adds to it is freed after reading."""

_PACKET_BYTES: Final = 4096
# A single read or write moves at most 2 GiB less a page.
_MOST_AT_ONCE: Final = 2**30


class Memory:
    """One end's view of the file, whose descriptor it owns."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._mapped = mmap.mmap(number, MAPPED_BYTES)

    @classmethod
    def create(cls) -> Self:
        """A new file. Raises `OSError`."""
        number = os.memfd_create("photo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(number, MAPPED_BYTES)
            fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            return cls(number)
        except BaseException:
            os.close(number)
            raise

    def close(self) -> None:
        """Release it."""
        self._mapped.close()
        os.close(self.number)

    def put(self, parts: Sequence[Part]) -> bytes:
        """Write a message's parts; returns the packet that announces them."""
        lengths = [size_of(part) for part in parts]
        mapped = sum(lengths) <= MAPPED_BYTES
        offset = 0
        for part, length in zip(parts, lengths, strict=True):
            if not length:  # an empty array cannot be cast
                continue
            content = memoryview(part).cast("B")  # type: ignore[arg-type]
            if mapped:
                self._mapped[offset : offset + length] = content
            else:
                self._write(content, offset)
            offset += length
        return json.dumps(lengths).encode()

    def lengths_of(self, packet: bytes, most: int = sys.maxsize) -> list[int]:
        """The lengths in a packet.

        Raises `ValueError` unless they are those of parts that the file can hold, at most ``most``
        bytes: a worker may be under the control of the file that it decodes.
        """
        try:
            lengths = json.loads(packet)
        except ValueError:
            lengths = None
        well_formed = (
            isinstance(lengths, list)
            and len(lengths) <= MAX_PARTS
            and all(type(length) is int and length >= 0 for length in lengths)
            and sum(lengths) <= most
            and (sum(lengths) <= MAPPED_BYTES or sum(lengths) <= os.fstat(self.number).st_size)
        )
        if not well_formed:
            raise ValueError("the packet does not describe a message")
        checked: list[int] = lengths
        return checked

    def get(self, lengths: Sequence[int]) -> list[bytes]:
        """Read the parts of a message, and free the memory that only a large one needs."""
        total = sum(lengths)
        parts, offset = [], 0
        for length in lengths:
            if total <= MAPPED_BYTES:
                parts.append(self._mapped[offset : offset + length])
            else:
                parts.append(self._read(length, offset))
            offset += length
        if total > MAPPED_BYTES:
            free_range(self.number, MAPPED_BYTES, total - MAPPED_BYTES)
        return parts

    def _write(self, content: memoryview, offset: int) -> None:
        while content:
            written = os.pwrite(self.number, content[:_MOST_AT_ONCE], offset)
            offset += written
            content = content[written:]

    def _read(self, length: int, offset: int) -> bytes:
        content = os.pread(self.number, min(length, _MOST_AT_ONCE), offset)
        if len(content) == length:
            return content
        pieces = [content]
        done = len(content)
        while done < length and pieces[-1]:
            pieces.append(os.pread(self.number, min(length - done, _MOST_AT_ONCE), offset + done))
            done += len(pieces[-1])
        if done < length:
            raise ValueError("the message is shorter than its packet says")
        return b"".join(pieces)


def size_of(part: Part) -> int:
    """The bytes of a part."""
    return len(part) if isinstance(part, bytes | bytearray) else part.nbytes


def receive(control: socket.socket) -> bytes:
    """The next packet; empty at the end. Raises `BlockingIOError` on a socket without one."""
    try:
        return control.recv(_PACKET_BYTES)
    except ConnectionError:
        return b""


def array(part: bytes, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A part as a read-only array. Raises `ValueError` if its size does not fit."""
    return np.frombuffer(part, dtype=dtype).reshape(shape)
