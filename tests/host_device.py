"""A simulated GPU: `service.inference.cuda`'s part on the CPU, with the same kernel.

The kernel's source is compiled as C++ and called once for each thread of each block; device memory
is the host's. Everything else of the GPU's path is the service's own: packing, rounds, binding,
the order of the commands.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt

from service.inference.cuda import KERNEL

_HOST = f"""
#include <cmath>
#include <cstddef>
#define __device__
#define __global__
struct Index {{ unsigned x, y, z; }};
static Index blockIdx, blockDim, threadIdx;
#include "{KERNEL}"
extern "C" void launch(unsigned pieces_count, unsigned most_pixels, const Piece* pieces,
                       const float* logits, int classes, unsigned char* out) {{
    blockDim.x = 256;
    for (blockIdx.y = 0; blockIdx.y < pieces_count; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x * blockDim.x < most_pixels; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
                upsample(pieces, logits, classes, out);
}}
extern "C" size_t piece_layout(int field) {{
    const size_t layout[] = {{
        offsetof(Piece, logits), offsetof(Piece, ids), offsetof(Piece, confidence),
        offsetof(Piece, row_step), offsetof(Piece, column_step), offsetof(Piece, first),
        offsetof(Piece, pixels), offsetof(Piece, width), offsetof(Piece, grid_height),
        offsetof(Piece, grid_width), sizeof(Piece)}};
    return layout[field];
}}
"""


def cpp_compiler() -> str:
    """Return the command that compiles C++."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "no C++ compiler: `make test` installs one"
    return compiler


@cache
def host_kernel() -> ctypes.CDLL:
    """Compile the kernel for the host, once per process."""
    folder = Path(mkdtemp(prefix="fcn-kernel-"))
    source, library = folder / "host.cpp", folder / "host.so"
    source.write_text(_HOST)
    subprocess.run(
        [cpp_compiler(), "-std=c++17", "-O2", "-shared", "-fPIC", "-o", library, source], check=True
    )
    loaded = ctypes.CDLL(str(library))
    shutil.rmtree(folder)
    loaded.piece_layout.restype = ctypes.c_size_t
    return loaded


def address(array: npt.NDArray[Any]) -> int:
    """Return the address of an array's data."""
    return int(array.ctypes.data)


@dataclass
class HostChannel:
    """`service.inference.lanes.Channel` in the host's memory; ``commands`` records its commands.

    Device buffers are separate from the host's, so data that was not uploaded is missing.
    """

    input: npt.NDArray[np.uint8]
    output: npt.NDArray[np.uint8]
    device_input: npt.NDArray[np.uint8]
    logits: npt.NDArray[np.float32]
    device_output: npt.NDArray[np.uint8]
    commands: list[tuple[str, int]] = field(default_factory=list)

    @property
    def input_address(self) -> int:
        """Address of the device's input."""
        return address(self.device_input)

    @property
    def logits_address(self) -> int:
        """Address of the device's logits."""
        return address(self.logits)

    def upload(self, size: int) -> None:
        """Copy to the device's input."""
        self.commands.append(("upload", size))
        self.device_input[:size] = self.input[:size]

    def upsample(self, pieces: int, most_pixels: int, classes: int) -> None:
        """Run the kernel."""
        self.commands.append(("upsample", pieces))
        host_kernel().launch(
            ctypes.c_uint(pieces),
            ctypes.c_uint(most_pixels),
            ctypes.c_void_p(self.input_address),
            ctypes.c_void_p(self.logits_address),
            ctypes.c_int(classes),
            ctypes.c_void_p(address(self.device_output)),
        )

    def download(self, size: int) -> None:
        """Copy from the device's output."""
        self.commands.append(("download", size))
        self.output[:size] = self.device_output[:size]

    def wait(self) -> tuple[float, float]:
        """A millisecond for the network, two for the rest."""
        return 0.001, 0.002


class HostDevice:
    """`service.inference.cuda.CudaDevice`, as far as the service uses it."""

    kind = "cpu"
    name = "host"
    has_tensor_cores = False
    compute_handle = 0

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal
        self.channels: list[HostChannel] = []

    def memory(self) -> tuple[int, int]:
        """Report a quarter of a gigabyte as used."""
        return 3 << 28, 1 << 30

    def open_channel(self, input_bytes: int, logits_bytes: int, output_bytes: int) -> HostChannel:
        """Open a channel whose buffers are full of garbage."""
        channel = HostChannel(
            np.full(input_bytes, 0xAB, dtype=np.uint8),
            np.full(output_bytes, 0xAB, dtype=np.uint8),
            np.full(input_bytes, 0xCD, dtype=np.uint8),
            np.full(logits_bytes // 4, np.nan, dtype=np.float32),
            np.full(output_bytes, 0xEF, dtype=np.uint8),
        )
        self.channels.append(channel)
        return channel
