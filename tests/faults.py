"""Networks that fail in ONNX Runtime, artefacts to damage in use, and a clock that jumps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.artefact.manifest import FileEntry, load_manifest
from tests.artefacts import add_precision, build_artefact, two_class_photo
from tests.host_device import cpp_compiler

Fault = Literal["hang", "error", "memory"]

FAULTS: Final[tuple[Fault, ...]] = ("hang", "error", "memory")
"""A pixel of 255 in red, green or blue triggers the first, second or third fault."""

_ENDLESS: Final = 2**62
_NOWHERE: Final = 1
_TOO_MUCH: Final = 2**44


def build_faulty_artefact(folder: Path) -> Path:
    """`build_artefact` with a network that has the `FAULTS`."""
    path = build_artefact(folder) / "network.onnx"
    network = onnx.load(path)
    _add_faults(network.graph)
    onnx.checker.check_model(network)
    onnx.save(network, path)
    entry = FileEntry.of(path, "fp32")
    load_manifest(folder).model_copy(update={"files": {path.name: entry}}).write(folder)
    return folder


def faulty_photo(fault: Fault) -> npt.NDArray[np.uint8]:
    """(64, 96, 3) uint8: `two_class_photo` with one pixel that triggers a fault."""
    photo = two_class_photo()
    photo[0, 0, FAULTS.index(fault)] = 255
    return photo


def build_artefact_in_two_files(folder: Path) -> Path:
    """`build_artefact` with an int8 network that refers to the other's weights.

    ONNX Runtime does not copy the bias: given a file's path, it reads the bias there at each run.
    """
    path = build_artefact(folder) / "network.onnx"
    add_precision(folder, "int8")
    content = path.read_bytes()
    other = folder / "network.int8.onnx"
    network = onnx.load(other)
    convolution = network.graph.node[-1]
    bias = convolution.input.pop()
    convolution.output[0] = "product"
    network.graph.node.append(helper.make_node("Sum", ["product", bias], ["logits"]))
    network.graph.initializer[-1].dims.extend([1, 1])
    for tensor in network.graph.initializer:
        raw = tensor.raw_data
        external = {"location": path.name, "offset": content.index(raw), "length": len(raw)}
        for key, value in external.items():
            tensor.external_data.add(key=key, value=str(value))
        tensor.data_location = TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
    onnx.save(network, other)
    manifest = load_manifest(folder)
    files = {**manifest.files, other.name: FileEntry.of(other, "int8")}
    manifest.model_copy(update={"files": files}).write(folder)
    return folder


def build_heavy_artefact(folder: Path, weights_bytes: int) -> Path:
    """`build_artefact` with ``weights_bytes`` of additional weights; each run reads some."""
    path = build_artefact(folder) / "network.onnx"
    network = onnx.load(path)
    graph = network.graph
    graph.node[-1].output[0] = "light"
    weights = np.zeros(weights_bytes // 4, dtype=np.float32)
    graph.initializer.extend(
        [
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(np.arange(4, dtype=np.int64), "axes"),
        ]
    )
    # The photo determines which weight is read, so that none can be folded into a constant.
    graph.node.extend(
        [
            helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.INT32),
            helper.make_node("ReduceMax", ["wide", "axes"], ["index"], keepdims=0),
            helper.make_node("Gather", ["weights", "index"], ["found"]),
            helper.make_node("Sum", ["light", "found"], ["logits"]),
        ]
    )
    onnx.save(network, path)
    entry = FileEntry.of(path, "fp32")
    load_manifest(folder).model_copy(update={"files": {path.name: entry}}).write(folder)
    return folder


def _add_faults(graph: onnx.GraphProto) -> None:
    graph.node[-1].output[0] = "sound"
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, dtype=np.int64), name)
        for name, value in {
            "axes": [0, 1, 2],
            "white": 255,
            "one": [1],
            "faults": [_ENDLESS, _NOWHERE, _TOO_MUCH],
        }.items()
    )
    graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.zeros(1, dtype=np.float32), "zero"),
        ]
    )
    graph.node.extend(
        [
            helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.INT32),
            helper.make_node("ReduceMax", ["wide", "axes"], ["brightest"], keepdims=0),
            helper.make_node("Cast", ["brightest"], ["levels"], to=TensorProto.INT64),
            helper.make_node("Equal", ["levels", "white"], ["matched"]),
            helper.make_node("Cast", ["matched"], ["switches"], to=TensorProto.INT64),
            helper.make_node("Mul", ["switches", "faults"], ["amounts"]),
            helper.make_node("Split", ["amounts"], ["turns", "index", "size"], num_outputs=3),
            helper.make_node("Loop", ["turns", "true", "zero"], ["late"], body=_turn()),
            helper.make_node("Gather", ["zero", "index"], ["found"]),
            helper.make_node("Add", ["size", "one"], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["room"]),
            helper.make_node("ReduceSum", ["room"], ["sum"], keepdims=0),
            helper.make_node("Sum", ["sound", "late", "found", "sum"], ["logits"]),
        ]
    )


def _turn() -> onnx.GraphProto:
    """The loop's body: an identity."""
    return helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("condition", "value")],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("condition_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_out", TensorProto.FLOAT, [1]),
        ],
    )


_CLOCK: Final = """
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

static const volatile int64_t* jump_s() {
    static const auto* mapped = static_cast<const volatile int64_t*>(
        mmap(nullptr, 8, PROT_READ, MAP_SHARED, open(getenv("TEST_CLOCK"), O_RDONLY), 0));
    return mapped;
}
extern "C" int clock_gettime(clockid_t id, timespec* now) noexcept {
    const long failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *jump_s();
    return static_cast<int>(failed);
}
extern "C" int gettimeofday(timeval* now, void*) noexcept {
    timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    *now = {exact.tv_sec, exact.tv_nsec / 1000};
    return 0;
}
extern "C" time_t time(time_t* told) noexcept {
    timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
"""


class WallClock:
    """The wall clock of processes that are started with ``environment``."""

    def __init__(self, folder: Path) -> None:
        source, library = folder / "clock.cpp", folder / "clock.so"
        self._jump = folder / "jump"
        self._jump.write_bytes(bytes(8))
        source.write_text(_CLOCK)
        subprocess.run(
            [cpp_compiler(), "-O2", "-shared", "-fPIC", "-o", library, source], check=True
        )
        self.environment = {"LD_PRELOAD": str(library), "TEST_CLOCK": str(self._jump)}

    def jump(self, seconds: int) -> None:
        """Set it ``seconds`` ahead of the true time."""
        with self._jump.open("r+b") as file:  # in place: it is mapped
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))
