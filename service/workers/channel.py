"""How the service and an image worker exchange data: a file in memory and a socket.

The parts of a message lie one after the other in the file; the socket carries their lengths. Both
sides copy out of the file and map nothing, so that neither can crash the other by truncating it,
and it needs no ``/dev/shm``, which containers limit to 64 MiB. Source: ``memfd_create(2)``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Part = bytes | bytearray | memoryview | npt.NDArray[Any]
"""Bytes or a C-contiguous array."""

MAX_PARTS: Final = 64

KEPT_BYTES: Final = 4 * 2**20
"""Size to which the file is cut after a larger message."""

_PACKET_BYTES: Final = 4096
# A single read or write moves at most 2 GiB less a page.
_MOST_AT_ONCE: Final = 2**30


def put(memory: int, parts: Sequence[Part]) -> bytes:
    """Write a message's parts to the file ``memory``; returns the packet that announces them."""
    lengths, offset = [], 0
    for part in parts:
        lengths.append(size_of(part))
        if not lengths[-1]:  # an empty array cannot be cast
            continue
        left = memoryview(part).cast("B")  # type: ignore[arg-type]
        while left:
            written = os.pwrite(memory, left[:_MOST_AT_ONCE], offset)
            offset += written
            left = left[written:]
    return json.dumps(lengths).encode()


def size_of(part: Part) -> int:
    """The bytes of a part."""
    return len(part) if isinstance(part, bytes | bytearray) else part.nbytes


def lengths_of(packet: bytes, memory: int, most: int = sys.maxsize) -> list[int]:
    """The lengths in a packet.

    Raises `ValueError` unless they are those of parts that the file ``memory`` can hold, at most
    ``most`` bytes: a worker may be under the control of the file that it decodes.
    """
    try:
        lengths = json.loads(packet)
    except ValueError:
        lengths = None
    well_formed = (
        isinstance(lengths, list)
        and len(lengths) <= MAX_PARTS
        and all(type(length) is int and length >= 0 for length in lengths)
        and sum(lengths) <= min(most, os.fstat(memory).st_size)
    )
    if not well_formed:
        raise ValueError("the packet does not describe a message")
    checked: list[int] = lengths
    return checked


def get(memory: int, lengths: Sequence[int]) -> list[bytes]:
    """Read the parts of a message, and give back the file's memory if it was a large one."""
    parts, offset = [], 0
    for length in lengths:
        parts.append(_read(memory, length, offset))
        offset += length
    if offset > KEPT_BYTES:
        os.ftruncate(memory, KEPT_BYTES)
    return parts


def _read(memory: int, length: int, offset: int) -> bytes:
    content = os.pread(memory, min(length, _MOST_AT_ONCE), offset)
    if len(content) == length:
        return content
    pieces = [content]
    done = len(content)
    while done < length and pieces[-1]:
        pieces.append(os.pread(memory, min(length - done, _MOST_AT_ONCE), offset + done))
        done += len(pieces[-1])
    if done < length:
        raise ValueError("the message is shorter than its packet says")
    return b"".join(pieces)


def receive(control: socket.socket) -> bytes:
    """The next packet; empty at the end. Raises `BlockingIOError` on a socket without one."""
    try:
        return control.recv(_PACKET_BYTES)
    except ConnectionError:
        return b""


def array(part: bytes, shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """A part as a read-only array. Raises `ValueError` if its size does not fit."""
    return np.frombuffer(part, dtype=dtype).reshape(shape)
